"""Random masks from counters: the same on every device and for any chunking, nested in density.

Philox4x32 (Salmon 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405). The key is (mask seed, 0); the counter is (element index
low, element index high, hash of the tensor's name, group of four models). One call gives one 32-bit
number for each model of the group, so appending a model leaves the masks of the others alone.
"""

import hashlib
from dataclasses import dataclass

import torch

ROUNDS = 7
"""Rounds of Philox; by its authors' account 7 pass every test of BigCrush. Part of the masks'
version, `config.mergekit.MASK_VERSION`."""

GROUP = 4
"""Models served by one call."""

DITHER = 2**32 - 1
"""The group whose first number rounds the merged element at random; no models are served by it."""

KEEP_ALL = 2**32
"""The keep level above every random number, which lie in [0, 2**32)."""

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Word = int | torch.Tensor
"""A 32-bit word, or an int64 tensor of them."""


@dataclass(frozen=True)
class MaskKey:
    """What random masks are drawn for.

    Attributes:
        seed: Mask seed of the recipe, in [0, 2**32).
        tensor: Name of the tensor in the checkpoint.
    """

    seed: int
    tensor: str


def keep_level(density: float) -> int:
    """Return floor(density * 2**32); an element is kept if its random number is below that."""
    return int(density * KEEP_ALL)


def random_words(
    key: MaskKey, group: int, first: int, count: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Return the random numbers of four models for consecutive elements of a tensor.

    Args:
        key: Seed and tensor.
        group: Which four models: 0 is the first four parents in recipe order.
        first: Index of the first element in the flat tensor.
        count: How many elements.
        device: Where the numbers are made; they do not depend on it.

    Returns:
        Four int64 tensors of `count` numbers in [0, 2**32).
    """
    index_P = torch.arange(first, first + count, dtype=torch.int64, device=device)
    name = int.from_bytes(hashlib.sha256(key.tensor.encode()).digest()[:4], "little")
    words = philox4x32((index_P & _LOW, index_P >> 32, name, group), (key.seed, 0))
    return tuple(torch.as_tensor(word, device=device).expand(count) for word in words)


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int], rounds: int = ROUNDS
) -> tuple[Word, Word, Word, Word]:
    """Return four random 32-bit words for each counter (Salmon 2011, section 3.3).

    Args:
        counter: Four words, or int64 tensors of one shape; not written to.
        key: Two words.
        rounds: 10 is the published default; masks use `ROUNDS`.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        upper = _half_round(c2, _MULTIPLIERS[1], c1, k0)
        c0, c1, c2, c3 = *upper, *_half_round(c0, _MULTIPLIERS[0], c3, k1)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _half_round(word: Word, multiplier: int, other: Word, key: int) -> tuple[Word, Word]:
    """Return a product's upper half, mixed with another word and the key, and its lower half."""
    low = word * multiplier
    # int64 wraps around and shifts its sign in; the 32 bits wanted are right all the same
    high = low >> 32
    high &= _LOW
    high ^= other
    high ^= key
    low &= _LOW
    return high, low
