"""What the textbook's methods are put together from; float64 numpy, tensors in their own shape."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""


@dataclass(frozen=True)
class Entry:
    """A merge method in the textbook.

    Attributes:
        run: Takes the base (None where there is none), the parents, the values of the parameters
            and the random numbers of the masks (one array for each parent), all arrays in the
            tensor's shape. Returns the merge, a bound on the terms that were added up, and where
            the result hangs on a rounding error (an election that is all but a tie).
        values: Parameters that the contract's usual values do not suit.
        exact: Parameters with which nothing is chosen by magnitudes, which 16-bit models round and
            the textbook does not.
        changes: Further settings that are compared, each instead of the usual values.
        extra_roundings: How many operations, one after another, there are more than in a sum.
    """

    run: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
    values: Mapping[str, object] = field(default_factory=dict)
    exact: Mapping[str, object] = field(default_factory=dict)
    changes: tuple[Mapping[str, object], ...] = ()
    extra_roundings: int = 0


def plain_sum(start, tensors, coefficients):
    terms = [c * tensor for c, tensor in zip(coefficients, tensors, strict=True)]
    bound = np.abs(start) + sum(np.abs(term) for term in terms)
    return start + sum(terms), bound, np.zeros(bound.shape, dtype=bool)


def deltas(base, parents):
    return [parent - base for parent in parents]


def base_plus(base, task_vectors, values):
    weights = np.array(values.per_model["weight"])
    if values.shared["normalize"] and abs(weights.sum()) >= 1e-8:
        weights = weights / weights.sum()
    return plain_sum(base, task_vectors, weights * values.shared["lambda"])


def column(weights, tensor):
    """One weight for each model, to be multiplied with a stack of tensors."""
    return np.array(weights).reshape(-1, *[1] * tensor.ndim)


def elected(base, task_vectors, values):
    weights = column(values.per_model["weight"], base)
    weighted = weights * np.array(task_vectors)
    total, bound = weighted.sum(0), np.abs(weighted).sum(0)
    agrees = np.sign(weighted) == np.where(total >= 0, 1.0, -1.0)
    share = np.where(agrees, weights, 0.0).sum(0)
    divisor = np.where(share == 0, 1.0, share) if values.shared["normalize"] else 1.0
    lam = values.shared["lambda"]
    merged = base + lam * np.where(agrees, weighted, 0.0).sum(0) / divisor
    doubtful = (np.abs(total) < 8 * ROUNDING * bound) & (bound > 0)
    return merged, np.abs(base) + np.abs(lam / divisor) * bound, doubtful


def largest(delta, density):
    if density == 0:
        return np.zeros(delta.shape, dtype=bool)
    count = max(1, int(density * delta.size))
    return np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-count]


def rescaled(base, parents, kept, values):
    if not values.shared["rescale"]:
        return kept
    scaled = []
    for delta, survivors in zip(deltas(base, parents), kept, strict=True):
        before, after = np.abs(delta).sum(), np.abs(survivors).sum()
        scaled.append(survivors * (before / after if min(before, after) >= 1e-7 else 1.0))
    return scaled


def random_words(seed, tensor, num_models, size, rounds=7):
    """Philox4x32 in unsigned numpy integers: one row of 32-bit numbers for each model."""
    name = int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:4], "little")
    index = np.arange(size, dtype=np.uint64)
    rows = []
    for group in range(-(-num_models // 4)):
        counter = np.stack(
            [index & 0xFFFFFFFF, index >> 32, np.full_like(index, name), np.full_like(index, group)]
        )
        rows.extend(philox(counter, (seed, 0), rounds))
    return np.array(rows[:num_models], dtype=np.float64)


def philox(counter, key, rounds):
    """Random123's round, with its roles of high and low halves written out."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.uint64(1) * word for word in counter]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    for _ in range(rounds):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        half = np.uint64(32)
        c = [(right >> half) ^ c[1] ^ k[0], right & mask, (left >> half) ^ c[3] ^ k[1], left & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c
