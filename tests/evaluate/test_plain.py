"""Values as JSON holds them, and digests that are the same everywhere."""

import functools
import json
import math

import numpy as np
import pytest

from evomerge.evaluate.plain import digest, is_finite, plain


def scale(value):
    return 2 * value


def test_plain_values_survive_json():
    value = (np.float64(0.5), np.array([[1, 2]]), {3: (True, None)}, "text", np.int64(7))
    assert plain(value) == [0.5, [[1, 2]], {"3": [True, None]}, "text", 7]
    assert json.loads(json.dumps(plain(value))) == plain(value)


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="set is neither number"):
        plain([{1, 2}])


@pytest.mark.parametrize("value", [math.nan, [1.0, -math.inf], {"a": [math.nan]}])
def test_not_finite(value):
    assert not is_finite(value)
    assert is_finite([1.0, {"a": "nan"}, None, True])


def test_digest_is_fixed():
    # a value that any other Python, machine or process must find again
    value = {"b": (1, 2.5, None), "a": {"x", "y"}, 3: b"\x00", "t": "\ud800ü"}
    assert digest(value) == "2503cd72df4c45f6ec45eba5874b9be7d082da5fd72fba24edf3036d673cd75c"
    assert digest(dict(reversed(value.items()))) == digest(value)


def test_digest_tells_values_apart():
    values = [1, 1.0, "1", True, None, [1], {"1": 1}, [[1]], "", math.nan, scale, len, digest]
    assert len({digest(value) for value in values}) == len(values)


def test_digest_of_functions_holds_no_address():
    assert digest(scale) == digest(functools.wraps(scale)(lambda v: v))
    assert digest(functools.partial(scale, 1)) == digest(functools.partial(scale, 1))
