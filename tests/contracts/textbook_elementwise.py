"""The methods that work element by element, as their papers write them."""

import numpy as np

from tests.contracts.textbook_parts import (
    ROUNDING,
    Entry,
    base_plus,
    column,
    deltas,
    elected,
    largest,
    rescaled,
)


def breadcrumbs(base, parents, values, words):
    return base_plus(base, without_extremes(base, parents, values), values)


def breadcrumbs_ties(base, parents, values, words):
    return elected(base, without_extremes(base, parents, values), values)


def without_extremes(base, parents, values):
    shares = zip(values.per_model["density"], values.per_model["gamma"], strict=True)
    pairs = zip(deltas(base, parents), shares, strict=True)
    kept = [delta * middle(delta, density, gamma) for delta, (density, gamma) in pairs]
    return rescaled(base, parents, kept, values)


def middle(delta, density, gamma):
    """Where magnitudes are that equal one of those kept, which follow one another in rank."""
    ranked, size = np.sort(np.abs(delta), axis=None), delta.size
    count, top = int(density * size), int(gamma * size)
    bottom = max(0, size - count - top)
    if count == 0:
        return np.zeros(delta.shape, dtype=bool)
    kept = ranked if density >= 1 else ranked[bottom : bottom + count]
    return (np.abs(delta) >= kept[0]) & (np.abs(delta) <= kept[-1])


def della(base, parents, values, words):
    return elected(base, by_rank(base, parents, values, words), values)


def della_linear(base, parents, values, words):
    return base_plus(base, by_rank(base, parents, values, words), values)


def by_rank(base, parents, values, words):
    settings = zip(values.per_model["density"], values.per_model["epsilon"], words, strict=True)
    kept = []
    for delta, (density, epsilon, word) in zip(deltas(base, parents), settings, strict=True):
        if density in (0.0, 1.0):
            kept.append(delta * density)
            continue
        step = np.floor(2 * epsilon * 2.0**32 / 254)
        level = np.floor((density - epsilon) * 2.0**32) + step * byte_ranks(np.abs(delta))
        kept.append(delta * (word < level))
    return rescaled(base, parents, kept, values)


def byte_ranks(magnitude):
    """Mean rank among equals along dimension 1 (of a vector along itself), in 254ths of the most."""
    rows = np.moveaxis(np.atleast_2d(magnitude), 1, -1)
    if rows.shape[-1] == 1:
        return np.full(magnitude.shape, 127.0)
    below = np.array(
        [[(row < value).sum() for value in row] for row in rows.reshape(-1, rows.shape[-1])]
    )
    up_to = np.array(
        [[(row <= value).sum() for value in row] for row in rows.reshape(-1, rows.shape[-1])]
    )
    mean = (below + up_to - 1) / 2
    ranks = np.floor(254 * mean / (rows.shape[-1] - 1) + 0.5).reshape(rows.shape)
    return np.moveaxis(ranks, -1, 1).reshape(magnitude.shape)


def sce(base, parents, values, words):
    vectors = np.array(deltas(base, parents))
    share = values.shared["select_topk"]
    if share < 1:
        variance = vectors.var(0)
        count = int(np.count_nonzero(variance) * share)
        vectors = vectors * (largest(variance, count / variance.size) if count else 0.0)
    energies = np.square(vectors).reshape(len(vectors), -1).mean(1)
    weights = energies / energies.sum() if energies.sum() >= 1e-6 else 1 / len(vectors)
    total, bound = vectors.sum(0), np.abs(vectors).sum(0)
    erased = column(np.broadcast_to(weights, len(vectors)), base) * (
        np.sign(vectors) == np.where(total >= 0, 1.0, -1.0)
    )
    divisor = np.maximum(erased.sum(0), 1e-6)
    merged = base + (vectors * erased).sum(0) / divisor
    doubtful = (np.abs(total) < 8 * ROUNDING * bound) & (bound > 0)
    return merged, np.abs(base) + (np.abs(vectors) * erased).sum(0) / divisor, doubtful


def ram(base, parents, values, words):
    return joined(base, parents, values.shared["epsilon"], np.ones(len(parents)))


def ramplus_tl(base, parents, values, words):
    epsilon = values.shared["epsilon"]
    active = np.abs(deltas(base, parents)) > epsilon
    count = active.sum(0)
    axes = tuple(range(1, active.ndim))
    shared, unique = (active & (count > 1)).sum(axes), (active & (count == 1)).sum(axes)
    ratio = shared / np.maximum(unique, max(epsilon, 1e-300))
    factors = 1 + values.shared["r"] * np.clip(ratio, 0, values.shared["alpha"])
    return joined(base, parents, epsilon, factors)


def joined(base, parents, epsilon, factors):
    vectors = np.array(deltas(base, parents))
    active = np.abs(vectors) > epsilon
    count = active.sum(0)
    shares = np.where(count == 1, column(factors, base), 1 / np.maximum(count, 1)) * active
    near = np.abs(np.abs(vectors) - epsilon) < 4 * ROUNDING * epsilon
    terms = vectors * shares
    return base + terms.sum(0), np.abs(base) + np.abs(terms).sum(0), near.any(0)


def nearswap(base, parents, values, words):
    distance = np.maximum(np.abs(base - parents[0]), 1e-6)
    share = np.minimum(values.shared["t"] / distance, 1.0)
    bound = np.abs(base) + np.abs(parents[0])
    return share * parents[0] + (1 - share) * base, bound, np.zeros(base.shape, dtype=bool)


def consensus(base, parents, values, words):
    vectors = np.array(deltas(base, parents))
    others = np.abs(vectors.sum(0) - vectors) * column(values.per_model["lambda_mask"], base)
    needed = (np.abs(vectors) >= others).sum(0)
    doubtful = np.abs(np.abs(vectors) - others) < 8 * ROUNDING * np.abs(vectors).sum(0)
    terms = vectors * column(values.per_model["weight"], base) * values.shared["lambda"]
    terms = terms * (needed >= values.shared["min_tasks"])
    return base + terms.sum(0), np.abs(base) + np.abs(terms).sum(0), doubtful.any(0)


def pcb(base, parents, values, words):
    vectors, density = np.array(deltas(base, parents)), values.shared["density"]
    within = [softmax(len(vectors) * norm(vector * vector)) for vector in vectors]
    between = [sum(softmax(norm(vector * other)) for other in vectors) for vector in vectors]
    score = np.array(within) * np.array(between)
    score = score * np.array([largest(one, density) for one in score])
    divisor = np.where(score.sum(0) == 0, 1.0, score.sum(0))
    terms = values.shared["lambda"] * column(values.per_model["weight"], base) * score * vectors
    bound = np.abs(base) + np.abs(terms).sum(0) / divisor
    return base + terms.sum(0) / divisor, bound, np.zeros(base.shape, dtype=bool)


def softmax(value):
    return np.exp(value) / np.exp(value).sum()


def norm(value):
    width = value.max() - value.min()
    return (value - value.min()) / (width if width > 0 else 1.0)


WHOLE = {"density": (1.0,) * 5}
CRUMBS = {"gamma": (0.03, 0.0, 0.1, 0.02, 0.3)}
CHANCES = {"density": (0.5, 0.8, 0.31, 1.0, 0.64), "epsilon": (0.15, 0.19, 0.3, 0.1, 0.0)}

TEXTBOOK_ELEMENTWISE = {
    "breadcrumbs": Entry(
        breadcrumbs,
        CRUMBS,
        exact=WHOLE,
        changes=({"gamma": (0.0,) * 5}, {"gamma": (1.0, 0.9, 0.5)}),
    ),
    "breadcrumbs_ties": Entry(
        breadcrumbs_ties, CRUMBS, exact=WHOLE, changes=({"gamma": (0.0,) * 5},)
    ),
    "della": Entry(della, CHANCES, exact=WHOLE, changes=({"epsilon": (0.0,) * 5},)),
    "della_linear": Entry(della_linear, CHANCES, exact=WHOLE, changes=({"epsilon": (0.0,) * 5},)),
    "sce": Entry(
        sce,
        {"select_topk": 0.6},
        exact={"select_topk": 1.0},
        changes=tuple({"select_topk": share} for share in (0.0, 1e-6, 0.01, 1.0)),
    ),
    "ram": Entry(ram, {"epsilon": 0.02}, changes=({"epsilon": 0.0}, {"epsilon": 1.0})),
    "ramplus_tl": Entry(
        ramplus_tl,
        {"epsilon": 0.02, "r": 0.3, "alpha": 1.5},
        changes=({"epsilon": 0.0}, {"r": -1.0}, {"alpha": 0.0}, {"epsilon": 0.05}),
    ),
    "nearswap": Entry(nearswap, {"t": 0.01}, changes=({"t": 0.0},)),
    "consensus": Entry(
        consensus,
        {"lambda_mask": (0.4137, 0.7321, 0.5571, 0.2173, 0.9137)},
        changes=({"min_tasks": 1}, {"min_tasks": 3}, {"lambda_mask": (0.0,) * 5}),
    ),
    "pcb": Entry(pcb, {"density": 0.6}, exact={"density": 1.0}, changes=({"density": 0.01},)),
}
"""Name to entry."""
