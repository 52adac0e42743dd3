"""Plain data: metric values as JSON holds them, and digests that are the same in every process."""

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from evomerge.evaluate.evaluator import Value


def plain(value: Any) -> Value:
    """Return a metric's value as JSON holds it: tuples and arrays become lists.

    Raises:
        TypeError: A value of another kind, which could not be stored.
    """
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    raise TypeError(f"{type(value).__name__} is neither number, text, list nor mapping")


def is_finite(value: Value) -> bool:
    """Return whether no NaN and no Inf is in a plain value."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(is_finite(member) for member in value)
    if isinstance(value, dict):
        return all(is_finite(member) for member in value.values())
    return True


def digest(value: Any) -> str:
    """Return the SHA-256 of what settings, tasks and documents are made of, in hexadecimal.

    Mappings count without regard to order, functions as their source text.
    """
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _canonical(member) for key, member in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(digest(member) for member in value)
    if isinstance(value, (list, tuple)):
        return [_canonical(member) for member in value]
    if isinstance(value, bytes):
        return value.hex()
    return _source(value) if callable(value) else str(value)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        # no text to be had (built in, or an object with __call__): its name, never its address
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"{named.__module__}.{named.__qualname__}"
