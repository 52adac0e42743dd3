"""The methods that need their tensor's shape, or its directions, as their papers write them."""

import itertools

import numpy as np

from tests.contracts.textbook_parts import ROUNDING, Entry, deltas, plain_sum


def nuslerp(base, parents, values, words):
    first, second = values.per_model["weight"]
    t = second / (first + second)
    x, y = parents if base is None else deltas(base, parents)
    start = 0.0 if base is None else base
    if values.shared["nuslerp_flatten"]:
        of_x, of_y = on_the_arc(x.ravel(), y.ravel(), t)
        return plain_sum(start, [x, y], [of_x, of_y])
    axis = 0 if values.shared["nuslerp_row_wise"] else x.ndim - 1
    rows = [np.moveaxis(v, axis, -1).reshape(-1, v.shape[axis]) for v in (x, y)]
    shares = np.array([on_the_arc(*pair, t) for pair in zip(*rows, strict=True)])
    shape = np.moveaxis(x, axis, -1).shape[:-1]
    return plain_sum(start, [x, y], [np.expand_dims(s.reshape(shape), axis) for s in shares.T])


def on_the_arc(x, y, t):
    """Spherical interpolation of two vectors; a straight line where there is no arc."""
    unit_x, unit_y = (v / max(np.linalg.norm(v), 1e-7) for v in (x, y))
    # half the angle from the sides of the triangle: exact for small angles too
    angle = 2 * np.arctan2(np.linalg.norm(unit_x - unit_y), np.linalg.norm(unit_x + unit_y))
    if len(x) == 1 or np.sin(angle) ** 2 < 1e-7:
        return 1 - t, t
    if not (x.any() and y.any()):
        angle = np.pi / 2
    return np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)


def multislerp(base, parents, values, words):
    weights = np.array(values.per_model["weight"])
    if values.shared["normalize_weights"]:
        weights = weights / weights.sum()
    vectors = np.array(parents if base is None else deltas(base, parents))
    flat = vectors.reshape(len(vectors), -1)
    start, eps = 0.0 if base is None else base, values.shared["eps"]
    norms = np.linalg.norm(flat, axis=1)
    units = flat / (norms + eps)[:, None]
    mean = weights @ units
    if np.linalg.norm(mean) < eps:
        return plain_sum(start, vectors, weights)
    mean = mean / np.linalg.norm(mean)
    tangent = weights @ (units - np.outer(units @ mean, mean))
    step = np.linalg.norm(tangent) + eps
    point = mean * np.cos(step) + tangent * np.sin(step) / step
    merged = (point * (weights @ norms)).reshape(vectors.shape[1:])
    bound = np.abs(start) + spanned(vectors, merged)
    return start + merged, bound, np.zeros(bound.shape, dtype=bool)


def spanned(vectors, merged):
    """The sum of the magnitudes of the terms that a combination of vectors consists of."""
    flat = np.array(vectors).reshape(len(vectors), -1)
    coefficients = np.linalg.lstsq(flat.T, merged.ravel(), rcond=None)[0]
    return (np.abs(coefficients) @ np.abs(flat)).reshape(merged.shape)


def karcher(base, parents, values, words):
    """By steps over the whole vectors, each of which must be nearer to the mean than the last."""
    flat = np.array([parent.ravel() for parent in parents])
    norms = np.linalg.norm(flat, axis=1)
    some = norms > values.shared["tol"]
    if flat.shape[1] == 1 or not some.any():
        return plain_sum(0.0, parents, [1 / len(parents)] * len(parents))
    units = flat[some] / norms[some, None]
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    for _ in range(int(values.shared["max_iter"])):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        far = angles >= values.shared["tol"]
        arcs = units[far] - np.outer(cosines[far], mean)
        tangent = (arcs * (angles[far] / np.sin(angles[far]))[:, None]).sum(0) / len(units)
        step = np.linalg.norm(tangent)
        if step < values.shared["tol"]:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
        mean /= np.linalg.norm(mean)
    merged = (mean * norms.mean()).reshape(parents[0].shape)
    return merged, spanned(parents, merged), np.zeros(merged.shape, dtype=bool)


def model_stock(base, parents, values, words):
    count, vectors = len(parents), np.array(deltas(base, parents))
    rows = vectors if values.shared["filter_wise"] else vectors.reshape(count, -1)
    norms = np.linalg.norm(rows, axis=-1)
    cosine = np.mean(
        [
            (rows[i] * rows[j]).sum(-1) / np.maximum(norms[i] * norms[j], 1e-6)
            for i, j in itertools.combinations(range(count), 2)
        ],
        axis=0,
    )
    divisor = 1 + (count - 1) * cosine
    t = np.where(np.abs(divisor) < 1e-6, 0.0, count * cosine / divisor)
    t = np.expand_dims(t, -1) if values.shared["filter_wise"] else t
    mean = np.mean(parents, axis=0)
    _, bound, doubtful = plain_sum(base, vectors, [1.0] * count)
    return t * mean + (1 - t) * base, (1 + np.abs(t)) * bound, doubtful


def arcee_fusion(base, parents, values, words):
    (parent,) = parents
    ours, theirs = softmax(parent) + 1e-8, softmax(base) + 1e-8
    divergence = (ours * np.log(ours / theirs)).sum(-1, keepdims=True)
    importance = np.abs(parent - base) * divergence
    ordered = np.sort(importance, axis=None)
    first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    merged = np.where(importance >= threshold, parent, base)
    # float32 leaves a divergence four units of the last place of 1, the sum of a row's probabilities
    error = np.abs(parent - base) * (4 * ROUNDING if base.shape[-1] > 1 else 0.0)
    doubtful = np.abs(importance - threshold) < error + 4 * error.mean()
    return merged, np.abs(base) + np.abs(parent), doubtful


def softmax(tensor):
    powers = np.exp(tensor - tensor.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def fourier(base, parents, values, words):
    """By the full complex transform with the zero frequency in the middle, as papers draw it."""
    filtered = [high_pass(d, values.shared["cutoff"]) for d in deltas(base, parents)]
    if values.shared["keep_norm"]:
        filtered = [
            f * np.linalg.norm(d) / (np.linalg.norm(f) or 1.0)
            for f, d in zip(filtered, deltas(base, parents), strict=True)
        ]
    weights = np.array(values.per_model["weight"]) * values.shared["lambda"]
    merged, bound, doubtful = plain_sum(base, filtered, weights)
    # float64 transforms err by the size of the largest elements
    return merged, bound + 1e-8 * np.abs(deltas(base, parents)).max(), doubtful


def high_pass(delta, cutoff):
    axes = tuple(range(max(0, delta.ndim - 2), delta.ndim))
    spectrum = np.fft.fftshift(np.fft.fftn(delta, axes=axes), axes=axes)
    steps = [np.arange(n) - n // 2 for n in (delta.shape[axis] for axis in axes)]
    parts = [step / (len(step) / 2) for step in steps]
    radius = np.sqrt(sum(np.square(p) for p in np.meshgrid(*parts, indexing="ij")))
    kept = np.fft.ifftshift(np.where(radius >= cutoff, spectrum, 0.0), axes=axes)
    return np.fft.ifftn(kept, axes=axes).real


def tsv(base, parents, values, words):
    vectors = deltas(base, parents)
    if base.ndim != 2:
        return base_plus_mean(base, vectors, values)
    share = values.shared["rank_share"] or 1 / len(vectors)
    rank = max(1, int(share * min(base.shape)))
    parts = [real_directions(vector) for vector in vectors]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    right = np.concatenate([v[:rank] for _, _, v in parts])
    sizes = np.concatenate([s[:rank] for _, s, _ in parts])
    merged = polar(left) @ np.diag(sizes) @ polar(right)
    return direction(base, merged, values)


def iso_c(base, parents, values, words):
    vectors = deltas(base, parents)
    if base.ndim != 2:
        return base_plus_mean(base, vectors, values)
    _, sizes, _ = real_directions(sum(vectors))
    mean = sizes.mean() if len(sizes) else 0.0
    return direction(base, mean * polar(sum(vectors)), values)


def real_directions(matrix):
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    kept = sizes > 2.0**-23 * sizes[0]
    return left[:, kept], sizes[kept], right[kept]


def polar(matrix):
    """The orthogonal factor by an inverse square root, not by the matrix's own singular vectors."""
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    squares, vectors = np.linalg.eigh(gram)
    kept = squares > 1e-13 * squares[-1:].clip(0)
    root = vectors[:, kept] / np.sqrt(squares[kept]) @ vectors[:, kept].T
    return root @ matrix if wide else matrix @ root


def base_plus_mean(base, vectors, values):
    share = values.shared["lambda"] / len(vectors)
    return plain_sum(base, vectors, [share] * len(vectors))


def direction(base, merged, values):
    return plain_sum(base, [merged], [values.shared["lambda"]])


TEXTBOOK_SHAPED: dict[str, Entry] = {
    "nuslerp": Entry(
        nuslerp,
        changes=(
            {"nuslerp_flatten": False},
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ),
        extra_roundings=8,
    ),
    "multislerp": Entry(multislerp, changes=({"normalize_weights": False}, {"eps": 1e-3})),
    "karcher": Entry(karcher, changes=({"max_iter": 1.0}, {"tol": 0.1})),
    "model_stock": Entry(model_stock, changes=({"filter_wise": True},), extra_roundings=8),
    "arcee_fusion": Entry(arcee_fusion),
    "fourier": Entry(
        fourier,
        values={"cutoff": 0.13},
        changes=({"cutoff": 0.0}, {"cutoff": 0.71}, {"keep_norm": True}),
        extra_roundings=4,
    ),
    "tsv": Entry(tsv, changes=({"rank_share": 1.0}, {"rank_share": 0.1}), extra_roundings=4),
    "iso_c": Entry(iso_c, extra_roundings=4),
}
"""Name to `Entry(run, values=..., exact=..., changes=..., extra_roundings=...)`."""
