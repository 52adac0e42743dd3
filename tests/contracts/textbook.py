"""The merge methods as their papers write them: what the kernels are measured by.

The first methods stand here, the others in the files beside; what an entry promises, and what its
function takes and returns, in `textbook_parts.Entry`.
"""

import numpy as np

from tests.contracts.textbook_elementwise import TEXTBOOK_ELEMENTWISE
from tests.contracts.textbook_parts import (
    ROUNDING,
    Entry,
    base_plus,
    deltas,
    elected,
    largest,
    philox,
    plain_sum,
    random_words,
    rescaled,
)
from tests.contracts.textbook_shaped import TEXTBOOK_SHAPED

__all__ = ["ROUNDING", "TEXTBOOK", "philox", "random_words"]


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


def randomly_kept(base, parents, values, words):
    kept = [
        delta * (word < density * 2.0**32)
        for delta, density, word in zip(
            deltas(base, parents), values.per_model["density"], words, strict=True
        )
    ]
    if values.shared["rescale_by_density"]:
        densities = values.per_model["density"]
        return [delta / (d if d > 0 else 1) for delta, d in zip(kept, densities, strict=True)]
    return rescaled(base, parents, kept, values)


def slerp(base, parents, values, words):
    t, model = values.shared["t"], parents[0]
    norms = np.linalg.norm(base), np.linalg.norm(model)
    cosine = (base * model).sum() / (norms[0] * norms[1]) if min(norms) > 1e-8 else 1.0
    if abs(cosine) > 0.9995:
        return plain_sum(0.0, [base, model], [1 - t, t])
    angle = np.arccos(cosine)
    return plain_sum(0.0, [base, model], np.sin([(1 - t) * angle, t * angle]) / np.sin(angle))


def passthrough(base, parents, values, words):
    return plain_sum(0.0, parents, values.per_model["scale"])


TEXTBOOK = {
    "linear": Entry(weighted_mean),
    "task_arithmetic": Entry(task_arithmetic),
    # the one tensor is the whole model
    "ties": Entry(ties, exact={"density": (1.0,) * 5}, changes=({"trim_whole_model": True},)),
    "dare_linear": Entry(dare_linear, changes=({"rescale_by_density": True},)),
    "dare_ties": Entry(dare_ties, changes=({"rescale_by_density": True},)),
    "slerp": Entry(slerp),
    "passthrough": Entry(passthrough),
    **TEXTBOOK_ELEMENTWISE,
    **TEXTBOOK_SHAPED,
}
"""Every merge method's `Entry`."""
