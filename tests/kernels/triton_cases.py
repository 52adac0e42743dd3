"""Jobs for the Triton kernels, and how they compare with the reference, bit by bit.

Run as a program, it prints how many jobs differ and exits with 1 if any does. Triton looks once, as
it is imported, whether its interpreter is wanted, so without a GPU this needs a process of its own:
`TRITON_INTERPRET=1 python -m tests.kernels.triton_cases cpu`.
"""

import dataclasses
import itertools
import math
import random
import sys
from functools import partial

import torch

from evomerge.kernels import reference, triton_launch
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.tables import Fused, Local, Mask, Span, TieCut
from evomerge.kernels.triton_pack import can_pack
from evomerge.methods.consensus import agreed
from evomerge.methods.nearswap import swapped
from evomerge.methods.ram import joined
from evomerge.methods.sce import elected
from tests.contracts.kernel import TABLES, bits, make_job
from tests.contracts.merge_method import DTYPES

SIZES = (1, 1024, 2059)
KEY = MaskKey(2**32 - 5, "model.layers.0.mlp.up_proj.weight")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WEIGHTS = (0.3, 0.9, -0.2, 0.55, 0.1, 0.7, 0.25, 0.4)
HALF = 2**31
NUM_RANKS = 2**12


def make_models(size, num_models, seed=0):
    """Return a base and sources: small steps, equal and opposite elements, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator) * 0.02
    base[::7] = -0.0
    sources = []
    for i in range(num_models):
        source = base + torch.randn(size, generator=generator) * 1e-3
        source[i::5] = base[i::5]
        source[i::11] = -0.0
        sources.append(source)
    return base, sources


def mask(num_models, **changes):
    """Return a mask that keeps everything, with some attributes changed."""
    weights = WEIGHTS[:num_models]
    whole = ((0.0,) * num_models, (KEEP_ALL,) * num_models)
    return dataclasses.replace(Mask(weights, weights, *whole, KEY, lam=1.3), **changes)


def masks(m):
    """Yield masks of m models with each option, and with all of them."""
    thresholds = tuple(0.0005 * (i % 3) for i in range(m))
    levels = tuple((HALF, 0, KEEP_ALL, 2**30)[i % 4] for i in range(m))
    cuts = tuple((TieCut(0.0011, 700), None, TieCut(0.002, 1500, HALF))[i % 3] for i in range(m))
    flat = tuple(torch.arange(i, i + NUM_RANKS).remainder(255).to(torch.uint8) for i in range(m))
    ranks = {"rank_steps": (2**22, 0) * 4, "ranks": flat}
    ranks = {name: values[:m] for name, values in ranks.items()}
    yield mask(m)
    yield mask(m, elect=True)
    yield mask(m, elect=True, normalize=True, thresholds=thresholds)
    yield mask(m, thresholds=thresholds, ceilings=(0.0015,) * m)
    yield mask(m, keep_levels=levels)
    yield mask(m, keep_levels=(0,) * m, elect=True)
    yield mask(m, keep_levels=levels, **ranks)
    yield mask(m, thresholds=thresholds, tie_cuts=cuts)
    yield mask(m, thresholds=(math.inf,) * m, elect=True, normalize=True)
    yield mask(
        m,
        thresholds=thresholds,
        ceilings=(0.002, math.inf) * (m // 2) + (0.002,) * (m % 2),
        keep_levels=levels,
        tie_cuts=cuts,
        elect=True,
        normalize=True,
        **ranks,
    )


def locals_of(m):
    """Yield the expressions that the kernels have."""
    weights, factors = WEIGHTS[:m], tuple(0.2 + 0.1 * i for i in range(m))
    positive = tuple(abs(weight) for weight in weights)
    run = partial(elected, threshold=1e-6, weights=positive)
    yield Local(run, Fused("sce", (positive,), (1e-6,)))
    yield Local(partial(joined, epsilon=5e-4, factors=factors), Fused("ram", (factors,), (5e-4,)))
    run = partial(agreed, weights=weights, factors=factors, min_tasks=2)
    yield Local(run, Fused("consensus", (weights, factors), (2.0,)))
    yield Local(partial(swapped, t=7e-4), Fused("nearswap", shared=(7e-4,)))


def tables(m):
    """Yield a table of each kind and option for m models."""
    yield Span(WEIGHTS[:m], 0.7)
    yield Span(WEIGHTS[:m], 1.0, deltas=True)
    yield from masks(m)
    yield from locals_of(m)


def population(m):
    """Yield tables of several recipes over the same sources."""
    for scale in (0.5, 1.0, 2.0):
        weights = tuple(scale * weight for weight in WEIGHTS[:m])
        yield Span(weights, 1.0, deltas=True)
        levels = tuple(int(scale * 2**30) + i for i in range(m))
        yield mask(m, scales=weights, keep_levels=levels, thresholds=(0.0003 * scale,) * m)


def guarded(size, dtype, device):
    """Return an output between elements that must stay as they are, and the whole."""
    whole = torch.full((size + 64,), 42.0, dtype=dtype, device=device)
    return whole[32 : 32 + size], whole


@dataclasses.dataclass(frozen=True)
class Case:
    """A job, the memory around its output, the same job for the reference, and what it is about."""

    job: KernelJob
    whole: torch.Tensor
    wanted: KernelJob
    guard: torch.Tensor
    about: str

    def differs(self, written):
        """Yield what differs from the reference; nothing where all is equal."""
        (told,) = reference.carry_out_all([self.wanted])
        if not told.is_finite:
            # which NaN it is, is left open
            told, written = (each._replace(checksum=0) for each in (told, written))
        whole = self.whole.cpu()
        wrong = bits(whole) != bits(self.guard)
        number = int(torch.where(self.guard.isfinite(), wrong, whole.isfinite()).sum())
        if number or told != written:
            yield f"{self.about}: {number} elements differ; {written}, and by the reference {told}"


def case_of(job, device, about):
    """Return the case of a job on the CPU, its tensors moved to a device, and each to an even place."""
    table = job.table
    if isinstance(table, Mask):
        table = dataclasses.replace(table, ranks=tuple(rank.to(device) for rank in table.ranks))
    source_MP = [source_P.clone().to(device) for source_P in job.source_MP]
    base_P = None if job.base_P is None else job.base_P.clone().to(device)
    wanted_P, guard = guarded(len(job.out_P), job.out_P.dtype, "cpu")
    out_P, whole = guarded(len(job.out_P), job.out_P.dtype, device)
    there = KernelJob(table, base_P, source_MP, out_P, job.dither, job.first)
    return Case(there, whole, dataclasses.replace(job, out_P=wanted_P), guard, about)


def drawn(number, device):
    """Yield cases of the kernels' contract: all kinds of tables, and numbers at all edges."""
    rng = random.Random(3)
    for i in range(number):
        name, size = rng.choice(list(TABLES)), rng.choice((0, 1, 7, 8, 1023, 2059))
        dtypes = [rng.choice(DTYPES)]
        job = make_job(rng, name, size, rng.randint(1, 8), dtypes=dtypes)
        case = case_of(job, device, f"drawn {i}, {job.table}")
        if can_pack(case.job):
            yield case


def cases(models, sizes, device, dtypes=(BF16,) * 3, dither=None, first=0, spoil=0.0):
    """Yield cases: every table, and those of a population, for each number of models.

    `spoil` is added to one element of the last source.
    """
    source, base, out = dtypes
    for m, size in itertools.product(models, sizes):
        base_P, source_MP = make_models(size, m)
        source_MP[-1][size // 2] += spoil
        base_P, source_MP = base_P.to(base), [source_P.to(source) for source_P in source_MP]
        empty_P = torch.empty(size, dtype=out)
        for table in [*tables(m), *population(m)]:
            if isinstance(table, Mask) and table.ranks and first + size > NUM_RANKS:
                continue
            job = KernelJob(table, base_P, source_MP, empty_P, dither, first)
            yield case_of(job, device, f"M {m}, P {size}, {dtypes}, from {first}, {table}")


def differences(cases):
    """Carry out cases in one call; return what differs from the reference."""
    cases = list(cases)
    written = triton_launch.carry_out_all([case.job for case in cases])
    return [line for case, told in zip(cases, written, strict=True) for line in case.differs(told)]


def every_group(device):
    """Yield groups of cases, each for one call."""
    key = MaskKey(5, "lm_head.weight")
    yield cases((1, 2, 3), SIZES, device)
    yield cases((5, 8), (1031,), device, dither=key)
    yield cases((3,), (2059,), device, (FP32, FP32, FP32), first=1032)
    yield cases((2,), (1031,), device, (FP16, BF16, FP16), first=8)
    yield cases((4,), (1031,), device, (BF16, FP32, FP32))
    # an index that no longer fits 32 bits
    yield cases((2,), (2059,), device, dither=key, first=2**32 - 2048)
    yield drawn(200, device)
    yield cases((2,), (1031,), device, spoil=math.nan)
    yield cases((2,), (1031,), device, (FP32, FP32, BF16), spoil=math.inf)


def main(device, extent="all"):
    """Print what differs; return the exit status."""
    groups = every_group(device) if extent == "all" else [cases((3,), (2059,), device)]
    lines, number = [], 0
    for group in map(list, groups):
        assert all(can_pack(case.job) for case in group), "the kernels must be able to do these"
        number += len(group)
        lines += differences(group)
    print(*lines, f"{number} jobs, {len(lines)} differ from the reference", sep="\n")  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
