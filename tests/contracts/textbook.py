"""The merge methods as their papers write them, in float64 numpy: what the kernels are measured by.

Each function takes the base (None where there is none), the parents, the values of the parameters
and the random numbers of the masks, and returns the merge, a bound on the terms that were added up,
and where the result hangs on a rounding error (an election that is all but a tie).
"""

import hashlib

import numpy as np

ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""


def weighted_mean(base, parents, values, words):
    weights = np.array(values.per_model["weight"])
    if values.shared["normalize"]:
        weights = weights / weights.sum()
    return plain_sum(0.0, parents, weights)


def task_arithmetic(base, parents, values, words):
    return base_plus(base, deltas(base, parents), values)


def ties(base, parents, values, words):
    kept = [
        delta * largest(delta, density)
        for delta, density in zip(deltas(base, parents), values.per_model["density"], strict=True)
    ]
    return elected(base, rescaled(base, parents, kept, values), values)


def dare_linear(base, parents, values, words):
    return base_plus(base, randomly_kept(base, parents, values, words), values)


def dare_ties(base, parents, values, words):
    return elected(base, randomly_kept(base, parents, values, words), values)


def slerp(base, parents, values, words):
    t, model = values.shared["t"], parents[0]
    norms = np.linalg.norm(base), np.linalg.norm(model)
    cosine = base @ model / (norms[0] * norms[1]) if min(norms) > 1e-8 else 1.0
    if abs(cosine) > 0.9995:
        return plain_sum(0.0, [base, model], [1 - t, t])
    angle = np.arccos(cosine)
    return plain_sum(0.0, [base, model], np.sin([(1 - t) * angle, t * angle]) / np.sin(angle))


def passthrough(base, parents, values, words):
    return plain_sum(0.0, parents, values.per_model["scale"])


TEXTBOOK = {
    "linear": weighted_mean,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "slerp": slerp,
    "passthrough": passthrough,
}


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


def elected(base, task_vectors, values):
    weights = np.array(values.per_model["weight"])[:, None]
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
    return np.abs(delta) >= np.sort(np.abs(delta))[-count]


def randomly_kept(base, parents, values, words):
    kept = [
        delta * (word < density * 2.0**32)
        for delta, density, word in zip(
            deltas(base, parents), values.per_model["density"], words, strict=True
        )
    ]
    return rescaled(base, parents, kept, values)


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
