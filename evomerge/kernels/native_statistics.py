"""Facts on tensors in C, compiled on this machine; packs what is passed to `statistics.c`.

Every function returns None where C cannot do it: without a compiler, or for tensors elsewhere than
on the CPU or of other dtypes than float32, bfloat16 and float16. What it returns has the bits of
the torch code that then takes its place, for any number of threads.
"""

import ctypes
import functools
import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from evomerge.kernels import compiler
from evomerge.kernels.masks import GROUP, KEEP_ALL
from evomerge.kernels.reference import ranges
from evomerge.kernels.tables import Fused, Mask

MAX_MODELS = 32

SPREAD = -1
"""In the place of a model: the spreads of all task vectors; see `sce.spread`."""

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "statistics.c", _HERE / "strips.h")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VECTORS, _KEPT, _SQUARES, _VARYING, _SHARES = range(5)
_FUSED = {"sce varying": _VARYING, "sce squares": _SQUARES, "ram shares": _SHARES}

PIECE = 2**15
"""Elements summed at once; sums depend on it in their last bits, so it is no setting."""

_MOST_AT_ONCE = 2**30
"""Elements that are counted in 32 bits."""

_LEAST_PER_THREAD = 2**18
"""A thread takes longer to start than to read much fewer elements."""


class _Kept(ctypes.Structure):
    """`Kept` of statistics.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("end", "cut_level")),
        ("ranks", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("threshold", "top", "above")),
        *((name, ctypes.c_uint32) for name in ("last", "rank_step")),
        *((name, ctypes.c_int32) for name in ("lane", "draws", "cuts")),
    )


class _Tensors(ctypes.Structure):
    """`Tensors` of statistics.c."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("dtypes", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("base_dtype", "num_models", "kind")),
        *((name, ctypes.c_uint32) for name in ("seed", "name")),
        ("number", ctypes.c_float),
    )


class _Packed:
    """A base and its parents as C sees them. What it points to lives as long as it does."""

    def __init__(self, base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]) -> None:
        self._alive: list[object] = [base_P, *source_MP]
        self.fields = _Tensors(size=len(source_MP[0]), num_models=len(source_MP))
        if base_P is not None:
            self.fields.base, self.fields.base_dtype = base_P.data_ptr(), _DTYPES[base_P.dtype]
        self.point("sources", (ctypes.c_void_p * len(source_MP))(*map(_address, source_MP)))
        dtypes = (_DTYPES[source_P.dtype] for source_P in source_MP)
        self.point("dtypes", (ctypes.c_int32 * len(source_MP))(*dtypes))

    def point(self, field: str, array: ctypes.Array) -> None:
        """Let a field point to an array."""
        self._alive.append(array)
        setattr(self.fields, field, ctypes.addressof(array))


def _address(tensor_P: torch.Tensor) -> int:
    return tensor_P.data_ptr()


def missing() -> str | None:
    """Tell why this machine cannot compile the C code; None where it can."""
    return compiler.missing(*_SOURCES)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiler.load(*_SOURCES)
    if library is not None:
        tensors, index = ctypes.POINTER(_Tensors), ctypes.c_int64
        span = (index, index, ctypes.c_void_p)
        library.sum_pieces.argtypes = (tensors, *span)
        library.count_all.argtypes = (tensors, ctypes.c_int, ctypes.c_int, *span)
        library.count_within.argtypes = (tensors, ctypes.c_int, ctypes.c_uint32, *span)
        library.rank_rows.argtypes = (tensors, ctypes.c_int, ctypes.c_int, index, *span)
    return library


def _packed(base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]) -> _Packed | None:
    """Return tensors as C sees them; None where it cannot read them, or they are empty."""
    tensors = [*source_MP] if base_P is None else [base_P, *source_MP]
    readable = (
        0 < len(source_MP) <= MAX_MODELS
        and len(source_MP[0]) > 0
        and all(_is_readable(tensor_P, len(source_MP[0])) for tensor_P in tensors)
    )
    return _Packed(base_P, source_MP) if readable and _library() is not None else None


def _is_readable(tensor_P: torch.Tensor, size: int) -> bool:
    return (
        tensor_P.is_cpu
        and tensor_P.dtype in _DTYPES
        and tensor_P.is_contiguous()
        and tensor_P.numel() == size
    )


def gram(
    base_P: torch.Tensor | None, source_MP: Sequence[torch.Tensor]
) -> tuple[tuple[float, ...], ...] | None:
    """Return inner products; see `sums.gram`."""
    packed = _packed(base_P, source_MP)
    if packed is None:
        return None
    packed.fields.kind = _VECTORS
    size = len(source_MP) + (base_P is not None)
    pairs = [(i, j) for i in range(size) for j in range(i, size)]
    found = dict(zip(pairs, _sums(packed, len(pairs)), strict=True))
    return tuple(tuple(found[min(i, j), max(i, j)] for j in range(size)) for i in range(size))


def term_sums(
    base_P: torch.Tensor, source_MP: Sequence[torch.Tensor], fused: Fused
) -> tuple[float, ...] | None:
    """Return the sums of the terms of a named expression; see `sums.term_sums`."""
    packed = _packed(base_P, source_MP) if fused.name in _FUSED else None
    if packed is None:
        return None
    packed.fields.kind = _FUSED[fused.name]
    packed.fields.number = fused.shared[0] if fused.shared else 0.0
    terms_per_model = {_VARYING: 0, _SQUARES: 1, _SHARES: 2}[packed.fields.kind]
    return _sums(packed, terms_per_model * len(source_MP) or 1)


def l1_norms(
    mask: Mask, base_P: torch.Tensor, source_MP: Sequence[torch.Tensor], models: Sequence[int]
) -> tuple[float, ...] | None:
    """Return what a mask leaves of the L1 norms of some task vectors; see `sums.l1_norms`."""
    packed = _packed(base_P, [source_MP[model] for model in models])
    each = (_kept(mask, model, len(base_P)) for model in models)
    kept = [of_model for of_model in each if of_model is not None]
    if packed is None or len(kept) < len(models):
        return None
    packed.fields.kind = _KEPT
    packed.fields.seed, packed.fields.name = mask.key.seed, _word(mask.key.tensor)
    packed.point("kept", (_Kept * len(kept))(*kept))
    return _sums(packed, len(kept))


def _word(name: str) -> int:
    """Return what of a tensor's name is in the counters; see `masks.random_words`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _kept(mask: Mask, model: int, size: int) -> _Kept | None:
    """Return what is kept of a model; None where C cannot tell by its numbers of 32 bits."""
    cut, level, ceiling = mask.tie_cut(model), mask.keep_levels[model], mask.ceiling(model)
    below = np.nextafter(np.float32(ceiling), np.float32(-math.inf))
    top = math.inf if ceiling == math.inf else float(below)
    kept = _Kept(
        threshold=mask.thresholds[model],
        top=top if level else -1.0,
        last=level - 1 if 0 < level < KEEP_ALL else KEEP_ALL - 1,
        lane=model,
        draws=mask.draws(model // GROUP),
    )
    if cut is not None:
        kept.cuts, kept.above, kept.end, kept.cut_level = True, cut.above, cut.end, cut.level
    step = mask.rank_steps[model] if mask.rank_steps else 0
    if not step or not 0 < level < KEEP_ALL:
        return kept
    rank_P = mask.ranks[model]
    if rank_P is None or rank_P.dtype is not torch.uint8 or not rank_P.is_contiguous():
        return None
    if not rank_P.is_cpu or len(rank_P) < size or not 0 < level + 255 * step <= KEEP_ALL:
        return None
    kept.rank_step, kept.ranks = step, rank_P.data_ptr()
    return kept


def counts(
    base_P: torch.Tensor,
    source_MP: Sequence[torch.Tensor],
    model: int,
    dtype: torch.dtype,
    within: int | None,
) -> np.ndarray | None:
    """Return how many magnitudes of a task vector have each of 2**16 keys, as int64.

    Args:
        base_P: The base.
        source_MP: The parents.
        model: Position of the parent, or `SPREAD`.
        dtype: Of the keys; see `histograms.count_keys`.
        within: See there.
    """
    packed = _packed(base_P, source_MP)
    if packed is None:
        return None
    parts = _parts(len(base_P), _LEAST_PER_THREAD, _MOST_AT_ONCE)
    found = np.zeros((len(parts), 2**16), dtype=np.int64)
    name, key = ("count_all", _DTYPES[dtype]) if within is None else ("count_within", within)
    places = zip(parts, found, strict=True)
    _run(name, packed, [(model, key, *part, row.ctypes.data) for part, row in places])
    return found.sum(axis=0)


def row_ranks(
    base_P: torch.Tensor, source_P: torch.Tensor, dtype: torch.dtype, row_size: int
) -> torch.Tensor | None:
    """Return the ranks of a task vector's magnitudes within consecutive rows.

    Args:
        base_P: The base.
        source_P: The parent.
        dtype: In which the magnitudes compare.
        row_size: Elements of a row.
    """
    packed = _packed(base_P, [source_P]) if row_size < 2**32 else None
    if packed is None:
        return None
    rank_P = torch.empty_like(base_P, dtype=torch.uint8)
    least = max(1, _LEAST_PER_THREAD // row_size)
    parts = _parts(len(base_P) // row_size, least)
    arguments = (0, _DTYPES[dtype], row_size)
    _run("rank_rows", packed, [(*arguments, *part, rank_P.data_ptr()) for part in parts])
    return rank_P


def _sums(packed: _Packed, num_terms: int) -> tuple[float, ...]:
    num_pieces = -(-packed.fields.size // PIECE)
    sums = np.empty((num_pieces, num_terms))
    parts = _parts(num_pieces, _LEAST_PER_THREAD // PIECE)
    _run("sum_pieces", packed, [(*part, sums.ctypes.data) for part in parts])
    return tuple(math.fsum(column) for column in sums.T.tolist())


def _parts(count: int, least: int, most: int = 2**62) -> list[tuple[int, int]]:
    """Return start and stop of the share of each thread, or of more parts than threads."""
    threads = min(torch.get_num_threads(), max(1, count // least))
    step = min(most, -(-count // threads))
    return list(ranges(count, step))


def _run(name: str, packed: _Packed, calls: Sequence[tuple[int, ...]]) -> None:
    """Call a function of the library once with each of several lists of arguments, by threads."""
    function = functools.partial(getattr(_library(), name), ctypes.byref(packed.fields))
    if len(calls) == 1:
        failed = function(*calls[0])
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            failed = any(threads.map(lambda arguments: function(*arguments), calls))
    if failed:
        raise MemoryError("there is no memory for the statistics of a tensor")
