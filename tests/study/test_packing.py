"""Packed data comes back bit for bit, and takes little room."""

import json
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.study.packing import pack, unpack

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


def bits(data):
    """The data with every float as its bytes, so that 0.0 is not -0.0 and 1.0 is not 1 or True."""
    if isinstance(data, float):
        return struct.pack("<d", data)
    if isinstance(data, list):
        return [bits(member) for member in data]
    if isinstance(data, dict):
        return {key: bits(member) for key, member in data.items()}
    return type(data), data


@given(PLAIN)
def test_round_trip_is_exact(data):
    packed = pack(data)
    assert bits(unpack(packed)) == bits(data)
    assert json.loads(json.dumps(packed)) == packed
    assert packed.isascii()
    assert not {"\n", '"', "\\"} & set(packed)


@pytest.mark.parametrize("text", ["", "x", "abcde", "!!!!!", "c$}H"])
def test_what_was_not_packed_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - base 85 and zlib have messages of their own
        unpack(text)


def test_loglikelihoods_take_about_six_bytes_each():
    # 400 numbers of 24 random bits: 3 bytes each, 5/4 in base 85, and what size and sign need
    rng = np.random.default_rng(0)
    numbers = rng.normal(-30, 8, 400).astype(np.float32).astype(float).tolist()
    assert len(pack(numbers)) < 6.5 * 400
    assert len(json.dumps(numbers)) > 15 * 400


def test_flags_take_about_two_bits_each():
    rng = random.Random(0)
    flags = [rng.random() < 0.1 for _ in range(1000)]
    assert len(pack(flags)) < 1000 * 2 / 8 * 1.25
