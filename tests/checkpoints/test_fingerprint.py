"""Hashes and digests: what they must see, and what they must not see."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.checkpoints.fingerprint import SAMPLE_BYTES, digest_of, fingerprint, full_hash
from evomerge.checkpoints.index import STORED_DTYPES
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.source import MemorySource
from evomerge.checksums import Checksum, checksum_of, tensor_checksum, weights_digest
from tests.checkpoints.conftest import random_bits, save

DTYPES = list(STORED_DTYPES.values())


def mix(word):
    """The documented mixing of one 64-bit word, in Python's integers."""
    word = word * 0xBF58476D1CE4E5B9 % 2**64
    word ^= word >> 32
    word = word * 0x94D049BB133111EB % 2**64
    return word ^ word >> 29


def checksum_by_definition(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    total = 0
    for i in range(0, len(data), 8):
        word = int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little")
        total += mix((word + i // 8 * 0x9E3779B97F4A7C15) % 2**64)
    return total % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8, 3), (5, 13, 11)])
def test_the_checksum_is_what_its_docstring_says(dtype, shape):
    tensor = random_bits(shape, dtype, 0)
    assert tensor_checksum(tensor) == checksum_by_definition(tensor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 700), st.sampled_from(DTYPES), st.integers(1, 900).map(lambda n: 8 * n))
def test_the_checksum_does_not_depend_on_the_chunks(size, dtype, chunk_bytes):
    tensor = random_bits((size,), dtype, 1)
    assert tensor_checksum(tensor, chunk_bytes) == checksum_by_definition(tensor)


def test_chunks_of_the_default_size_are_joined_right():
    tensor = random_bits((2**18 + 1001,), torch.bfloat16, 2)
    expected = tensor_checksum(tensor, chunk_bytes=2**24)
    assert tensor_checksum(tensor) == tensor_checksum(tensor, chunk_bytes=8008) == expected


def test_views_have_the_checksum_of_their_elements():
    tensor = random_bits((9, 10), torch.bfloat16, 3)
    for view in (tensor.T, tensor[1:], tensor.flatten()[3:], tensor[::2, 1::3]):
        assert tensor_checksum(view) == checksum_by_definition(view.clone())


def test_the_checksum_leaves_the_tensor_alone():
    tensor = random_bits((100,), torch.int64, 4)
    before = tensor.clone()
    tensor_checksum(tensor)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_differences_are_seen(dtype):
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    tensor = torch.linspace(-1, 1, 50).to(dtype)
    tensor[7] = float("nan")
    seen = {tensor_checksum(tensor)}
    variants = [tensor.clone() for _ in range(6)]
    variants[0][[3, 4]] = tensor[[4, 3]]  # neighbours swapped, within one word
    variants[1][[3, 40]] = tensor[[40, 3]]
    variants[2].view(bits)[9] ^= torch.iinfo(bits).min  # a sign
    variants[3].view(bits)[7] ^= 1  # a NaN's payload
    variants[4].view(bits)[49] ^= 1
    variants[5] = tensor.roll(1)
    seen |= {tensor_checksum(variant) for variant in variants}
    assert len(seen) == 7
    zeros = torch.zeros(50, dtype=dtype)
    assert tensor_checksum(zeros) != tensor_checksum(-zeros)
    assert len({tensor_checksum(torch.zeros(8 * n, dtype=dtype)) for n in range(20)}) == 20


def test_patterns_that_cancel_in_a_plain_weighted_sum_are_seen():
    # +1 -1 -1 +1 at evenly spaced places has no effect on sum(position * value)
    tensor = torch.zeros(64, dtype=torch.int64)
    seen = {tensor_checksum(tensor)}
    for size in range(64):
        changed = tensor.clone()
        for place, sign in zip((3, 13, 23, 33), (1, -1, -1, 1), strict=True):
            changed[place] += sign << size if size < 63 else -(2**63)
        seen.add(tensor_checksum(changed))
    assert len(seen) == 65


def test_every_bit_of_a_tensor_matters_to_the_checksum():
    tensor = random_bits((40,), torch.bfloat16, 5)
    raw = tensor.view(torch.uint8)
    seen = {tensor_checksum(tensor)}
    for place in range(raw.numel()):
        for bit in range(8):
            raw[place] ^= 1 << bit
            seen.add(tensor_checksum(tensor))
            raw[place] ^= 1 << bit
    assert len(seen) == 40 * 16 + 1


def test_digests_cover_name_dtype_shape_and_bits_but_not_order(tensors):
    rows = {name: checksum_of(tensor) for name, tensor in tensors.items()}
    digest = weights_digest(rows)
    assert weights_digest(dict(reversed(rows.items()))) == digest
    assert digest_of(MemorySource(tensors)) == digest
    name = "model.layers.0.up.weight"
    kept = rows[name]
    assert kept == Checksum("float32", (3, 5), checksum_by_definition(tensors[name]))
    others = [
        rows | {name: kept._replace(dtype="int32")},
        rows | {name: kept._replace(shape=(5, 3))},
        rows | {name: kept._replace(value=kept.value ^ 1)},
        {key: row for key, row in rows.items() if key != name},
        {key + "s" if key == name else key: row for key, row in rows.items()},
    ]
    assert len({digest, *map(weights_digest, others)}) == len(others) + 1


# checkpoints on disk


@pytest.fixture
def large():
    """Tensors larger than what the fingerprint samples."""
    return {
        "a.0.w": random_bits((3, 40_000), torch.bfloat16, 0),
        "a.1.w": random_bits((50_000,), torch.float32, 1),
        "b": random_bits((3,), torch.int64, 2),
    }


def hashes(folder):
    return fingerprint(folder), full_hash(folder), digest_of(open_checkpoint(folder))


def test_files_and_shards_do_not_show(large, tmp_path):
    expected = hashes(save(tmp_path / "one", [large]))
    parts = [{name: tensor} for name, tensor in reversed(large.items())]
    assert hashes(save(tmp_path / "many", parts)) == expected
    (tmp_path / "bin").mkdir()
    torch.save(large, tmp_path / "bin" / "pytorch_model.bin")
    assert hashes(tmp_path / "bin") == expected
    assert digest_of(MemorySource(large)) == expected[2]
    assert len({*expected}) == 3


def test_the_full_hash_is_sha256_of_headers_and_bytes(tmp_path):
    folder = save(tmp_path, [{"b": torch.ones(2), "a": torch.zeros(1, dtype=torch.bfloat16)}])
    text = b'["a", "bfloat16", [1]]\0\0' + b'["b", "float32", [2]]' + b"\0\0\x80\x3f" * 2
    assert full_hash(folder) == hashlib.sha256(text).hexdigest()


def test_any_bit_shows_in_the_full_hash_and_the_digest(large, tmp_path):
    before = hashes(save(tmp_path / "before", [large]))
    large["a.1.w"].view(torch.int32)[SAMPLE_BYTES // 4 + 5] ^= 1
    after = hashes(save(tmp_path / "after", [large]))
    assert before[1:] != after[1:]
    assert before[1] != after[1]
    assert before[2] != after[2]


@pytest.mark.parametrize("name", ["a.0.w", "a.1.w", "b"])
def test_a_fine_tune_of_a_single_tensor_shows_in_the_fingerprint(large, tmp_path, name):
    before = fingerprint(save(tmp_path / "before", [large]))
    # only the lowest bit of one element in a thousand; small tensors, of every element
    raw = large[name].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[large[name].itemsize])
    raw.flatten()[:: 1000 if raw.numel() > 1000 else 1] ^= 1
    assert fingerprint(save(tmp_path / "after", [large])) != before


@pytest.mark.parametrize("place", [0, -1])
def test_the_ends_of_every_tensor_show_in_the_fingerprint(large, tmp_path, place):
    before = fingerprint(save(tmp_path / "before", [large]))
    large["a.1.w"].view(torch.int32)[place] ^= 1
    assert fingerprint(save(tmp_path / "after", [large])) != before


def test_names_and_shapes_show_in_the_fingerprint(large, tmp_path):
    prints = {fingerprint(save(tmp_path / "0", [large]))}
    prints.add(fingerprint(save(tmp_path / "1", [{"c" + n: t for n, t in large.items()}])))
    large["b"] = large["b"].reshape(1, 3)
    prints.add(fingerprint(save(tmp_path / "2", [large])))
    large["b"] = large["b"].view(torch.float32)[:0]
    prints.add(fingerprint(save(tmp_path / "3", [large])))
    assert len(prints) == 4
