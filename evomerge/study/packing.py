"""Packing: plain data as a short line of text that gives every number back bit for bit.

Floats are taken out of the data and kept as eight planes of bytes: the sign and exponent of numbers
of one size repeat, and the last bytes of numbers that came from float32 are zero, so both compress.
"""

import json
import zlib
from base64 import b85decode, b85encode
from typing import Any

import numpy as np


def pack(data: Any) -> str:
    """Return plain data (as JSON has it, all floats, tuples become lists) as printable ASCII."""
    floats: list[float] = []
    skeleton = json.dumps(_without_floats(data, floats), separators=(",", ":")).encode()
    planes = np.array(floats, dtype="<f8").view(np.uint8).reshape(-1, 8).T.tobytes()
    return b85encode(zlib.compress(skeleton + b"\n" + planes, 9)).decode()


def unpack(text: str) -> Any:
    """Return what was packed.

    Raises:
        ValueError: The text was not made by `pack`.
    """
    try:
        skeleton, _, planes = zlib.decompress(b85decode(text)).partition(b"\n")
    except zlib.error as error:
        raise ValueError(f"not packed data ({error})") from None
    bytes_8N = np.frombuffer(planes, dtype=np.uint8).reshape(8, -1)
    floats = iter(np.ascontiguousarray(bytes_8N.T).view("<f8").ravel().tolist())
    return json.loads(skeleton, parse_float=lambda placeholder: next(floats))


def _without_floats(data: Any, floats: list[float]) -> Any:
    """Move the floats into the list, in the order in which JSON writes them; leave 0.0 instead."""
    if isinstance(data, float):
        floats.append(data)
        return 0.0
    if isinstance(data, (list, tuple)):
        return [_without_floats(member, floats) for member in data]
    if isinstance(data, dict):
        return {key: _without_floats(member, floats) for key, member in data.items()}
    return data
