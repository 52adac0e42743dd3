from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.mergekit import MASK_VERSION
from evomerge.kernels import masks
from evomerge.kernels.masks import KEEP_ALL, MaskKey, keep_level, philox4x32, random_words
from tests.contracts import textbook

KEY = MaskKey(seed=7, tensor="model.embed_tokens.weight")
WORD = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_ten_rounds_give_the_published_numbers(counter, key, words):
    """Known answers of Random123 (kat_vectors, philox4x32-10), from integers and from tensors."""
    assert philox4x32(counter, key, rounds=10) == words
    tensors = tuple(torch.tensor([word], dtype=torch.int64) for word in counter)
    assert tuple(word.item() for word in philox4x32(tensors, key, rounds=10)) == words
    assert [word.item() for word in tensors] == list(counter)


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_seven_rounds_agree_with_unsigned_arithmetic(counter, key):
    theirs = textbook.philox([np.array([word], dtype=np.uint64) for word in counter], key, 7)
    assert philox4x32(counter, key) == tuple(int(word[0]) for word in theirs)


def test_words_are_drawn_for_element_tensor_seed_and_model():
    ours = torch.stack([*random_words(KEY, 0, 0, 1000), *random_words(KEY, 1, 0, 1000)])
    theirs = textbook.random_words(KEY.seed, KEY.tensor, 8, 1000)
    assert np.array_equal(ours.numpy(), theirs)
    others = [
        random_words(MaskKey(8, KEY.tensor), 0, 0, 1000),
        random_words(MaskKey(7, "lm_head.weight"), 0, 0, 1000),
        random_words(KEY, 0, 1, 1000),
    ]
    for other in others:
        equal = torch.stack(list(other)) == ours[:4]
        assert equal.float().mean() < 0.01


@pytest.mark.parametrize("first", [0, 12_345, 2**32 - 500])
def test_chunks_do_not_matter_not_even_beyond_32_bits(first):
    whole = torch.stack(random_words(KEY, 0, first, 1000))
    parts = [torch.stack(random_words(KEY, 0, first + i, 250)) for i in range(0, 1000, 250)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert len(torch.unique(whole)) == 4000  # by chance two are equal once in 500 such draws


def test_words_beyond_32_bits_of_index_are_new_ones():
    assert not torch.equal(random_words(KEY, 0, 0, 10)[0], random_words(KEY, 0, 2**32, 10)[0])


def test_words_are_uniform_and_independent_between_models():
    words = torch.stack(random_words(KEY, 0, 0, 2**16)).double() / 2**32
    for row in words:
        counts = torch.histc(row, bins=64, min=0.0, max=1.0)
        chi_squared = ((counts - 1024) ** 2 / 1024).sum().item()
        assert 26 < chi_squared < 120  # 63 degrees of freedom, chance of being outside 2e-5
    correlation = torch.corrcoef(words) - torch.eye(4)
    assert correlation.abs().max() < 5 / 2**8  # 5 standard errors of 2**16 draws


@given(st.floats(0.0, 1.0))
def test_keep_level_is_exact(density):
    assert keep_level(density) == int(Fraction(density) * 2**32)


def test_keep_level_ends():
    assert (keep_level(0.0), keep_level(0.5), keep_level(1.0)) == (0, 2**31, KEEP_ALL)


def test_version_names_what_is_drawn():
    assert f"philox4x32-{masks.ROUNDS}" == MASK_VERSION
