"""What every implementation of the kernels promises: the reference's bits, no more and no less."""

import dataclasses
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.kernels import reference
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.kernels.tables import Fused, Local, Mask, Span, TieCut
from evomerge.methods import METHODS, consensus, nearswap, ram, sce
from tests.contracts.merge_method import DTYPES, NAME, SEED, make_tensors, make_values

SIZES = [0, 1, 7, 8, 511, 512, 4097, 100_003]
KEY = MaskKey(11, "model.layers.1.mlp.down_proj.weight")
OTHER_KEY = MaskKey(2**32 - 1, "lm_head.weight")
GUARD = 9
"""Elements on both sides of an output that must stay as they are; odd, so nothing is aligned."""

EDGES = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-45, 1e-40, -2e-38, 1.5, -1.5, 0.05, -0.05, 6e-8, 3e4, 1e37, -1e37]
)


# ---- tables


def spans(rng, num_models, first, size):
    weights = signed(rng, num_models)
    return Span(weights, rng.choice([0.0, 1.0, -0.3]), deltas=rng.random() < 0.5)


def masks(rng, num_models, first, size):
    """A mask with some of all that there is to choose."""
    elect = rng.random() < 0.6
    ranked = rng.random() < 0.4
    end = first + rng.randint(0, size)
    cuts = [None, TieCut(0.051), TieCut(0.06, end=end), TieCut(0.06, level=2**30)]
    cuts += [TieCut(0.07, level=0), TieCut(0.055, end=end, level=3 * 2**30)]
    return Mask(
        scales=signed(rng, num_models),
        weights=signed(rng, num_models),
        thresholds=some(rng, num_models, [0.0, 0.0, 0.03, 0.05, 1e-50, 1.0, math.inf]),
        keep_levels=some(rng, num_models, [0, 1, KEEP_ALL, KEEP_ALL, KEEP_ALL - 1, 2**31, 12345]),
        key=rng.choice([KEY, OTHER_KEY]),
        elect=elect,
        normalize=elect and rng.random() < 0.6,
        lam=rng.choice([1.0, -0.7, 0.0]),
        ceilings=rng.choice([(), some(rng, num_models, [math.inf, 0.1, 0.04, 0.0])]),
        rank_steps=some(rng, num_models, [0, 2**22, -(2**20), 2**24]) if ranked else (),
        ranks=tuple(ranks(rng, first + size) for _ in range(num_models)) if ranked else (),
        tie_cuts=rng.choice([(), some(rng, num_models, cuts)]),
    )


def ranks(rng, size):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)


def sces(rng, num_models, first, size):
    threshold, weights = rng.choice([0.0, 0.004, math.inf]), signed(rng, num_models)
    run = partial(sce.elected, threshold=threshold, weights=weights)
    return Local(run, Fused("sce", (weights,), (threshold,)))


def rams(rng, num_models, first, size):
    epsilon, factors = rng.choice([0.0, 1e-5, 0.05]), signed(rng, num_models)
    run = partial(ram.joined, epsilon=epsilon, factors=factors)
    return Local(run, Fused("ram", (factors,), (epsilon,)))


def consensuses(rng, num_models, first, size):
    weights, factors = signed(rng, num_models), some(rng, num_models, [0.0, 0.4, 0.8])
    least = rng.randint(1, num_models)
    run = partial(consensus.agreed, weights=weights, factors=factors, min_tasks=least)
    return Local(run, Fused("consensus", (weights, factors), (float(least),)))


def nearswaps(rng, num_models, first, size):
    t = rng.choice([0.0, 0.01, 1.0])
    return Local(partial(nearswap.swapped, t=t), Fused("nearswap", shared=(t,)))


TABLES = {
    "span": spans,
    "mask": masks,
    "sce": sces,
    "ram": rams,
    "consensus": consensuses,
    "nearswap": nearswaps,
}


def signed(rng, num_models):
    """Numbers of both signs, some of which cancel."""
    numbers = [rng.choice([rng.uniform(-1, 1), 0.5, -0.5, 0.0, 0.1]) for _ in range(num_models)]
    return tuple(numbers)


def some(rng, num_models, choices):
    return tuple(rng.choice(choices) for _ in range(num_models))


# ---- jobs


def make_models(rng, num_models, size, dtypes, device):
    """A base and sources near it, with edge values among them, none of them aligned."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    start = torch.randn(size, generator=generator) * 0.1
    models = [start] + [
        start + 0.05 * torch.randn(size, generator=generator) for _ in range(num_models)
    ]
    for model in models:
        edges = EDGES[torch.randint(len(EDGES), (size // 5,), generator=generator)]
        model[torch.randint(max(size, 1), (size // 5,), generator=generator)] = edges
    return [unaligned(model.to(rng.choice(dtypes)).to(device)) for model in models]


def unaligned(tensor):
    """The same elements, one element further on than memory is aligned."""
    space = tensor.new_zeros(len(tensor) + 1)
    space[1:] = tensor
    return space[1:]


def make_job(rng, name, size, num_models, *, dtypes=DTYPES, out_dtype=None, device="cpu"):
    first = 8 * rng.choice([0, 1, 77])
    table = TABLES[name](rng, num_models, first, size)
    base, *sources = make_models(rng, num_models, size, dtypes, device)
    without_base = isinstance(table, Span) and rng.random() < 0.5
    out = poisoned(size, out_dtype or rng.choice(DTYPES), device)
    dither = rng.choice([None, OTHER_KEY]) if out.dtype is torch.bfloat16 else None
    return KernelJob(table, None if without_base else base, sources, out, dither, first)


def poisoned(size, dtype, device="cpu"):
    """An output of NaN within more NaN."""
    return torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)[GUARD:-GUARD]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def assert_same(kernels, jobs):
    """Carry out jobs by the reference and by an implementation, and compare all there is."""
    copies = [
        dataclasses.replace(job, out_P=poisoned(len(job.out_P), job.out_P.dtype)) for job in jobs
    ]
    expected = reference.carry_out_all([on_cpu(job) for job in copies])
    assert all(map(kernels.can_run, jobs))
    inputs = [
        tensor for job in jobs for tensor in (job.base_P, *job.source_MP) if tensor is not None
    ]
    before = [bits(tensor).clone() for tensor in inputs]
    written = kernels.carry_out_all(jobs)
    assert all(
        torch.equal(bits(t), bits_before) for t, bits_before in zip(inputs, before, strict=True)
    )
    for job, copy, ours, theirs in zip(jobs, copies, written, expected, strict=True):
        assert_equal_bits(job.out_P.cpu(), copy.out_P, job)
        assert ours.is_finite == theirs.is_finite
        assert ours.checksum == theirs.checksum or not theirs.is_finite
        space = job.out_P._base
        assert bool(space[:GUARD].isnan().all())
        assert bool(space[len(space) - GUARD :].isnan().all())


def on_cpu(job):
    base = None if job.base_P is None else job.base_P.cpu()
    return dataclasses.replace(job, base_P=base, source_MP=[s.cpu() for s in job.source_MP])


def assert_equal_bits(ours, theirs, job):
    """Equal in every bit where the reference is finite, and not finite where it is not."""
    differ = torch.where(theirs.isfinite(), bits(ours) != bits(theirs), ours.isfinite())
    places = differ.nonzero().flatten()[:5]
    assert not len(places), (job.table, places, ours[places], theirs[places])


class KernelContract:
    """Give a fixture `kernels` of the module's scope: a row of `dispatch.KERNELS`."""

    device = "cpu"

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", TABLES)
    def test_equals_the_reference(self, kernels, name, size):
        for num_models in range(1, 10):
            rng = random.Random(f"{name} {size} {num_models}")
            assert_same(kernels, [make_job(rng, name, size, num_models, device=self.device)])

    @pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", TABLES)
    def test_every_pair_of_dtypes(self, kernels, name, dtype, out_dtype):
        rng = random.Random(f"{name} {dtype} {out_dtype}")
        options = {"dtypes": [dtype], "out_dtype": out_dtype, "device": self.device}
        assert_same(kernels, [make_job(rng, name, 4097, 3, **options) for _ in range(3)])

    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 2**32),
        names=st.lists(st.sampled_from(list(TABLES)), min_size=1, max_size=4),
        size=st.integers(0, 2000),
        num_models=st.integers(1, 12),
    )
    def test_any_launch(self, kernels, seed, names, size, num_models):
        rng = random.Random(seed)
        assert_same(
            kernels, [make_job(rng, name, size, num_models, device=self.device) for name in names]
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method(self, kernels, method, dtype):
        row = METHODS[method]
        for shape in ((1,), (61, 33), (9, 20, 11)):
            for wanted in (3, 5):
                number = max(min(wanted, row.max_parents or wanted), row.min_parents)
                job = method_job(row, number, shape, dtype, self.device)
                if kernels.can_run(job):
                    assert_same(kernels, [job])

    def test_jobs_on_the_same_sources(self, kernels):
        rng = random.Random(5)
        jobs = [make_job(rng, name, 70_001, 4, device=self.device) for name in list(TABLES) * 2]
        shared = [
            dataclasses.replace(job, base_P=jobs[0].base_P, source_MP=jobs[0].source_MP, first=0)
            for job in jobs
            if not (isinstance(job.table, Mask) and job.table.ranks)
        ]
        shared = [job for job in shared if job.base_P is not None or isinstance(job.table, Span)]
        assert len(shared) > 6
        others = [make_job(rng, "span", size, 2, device=self.device) for size in (5, 40_000)]
        assert_same(kernels, [others[0], *shared, others[1]])

    @pytest.mark.parametrize("first", [8, 2**31 - 8, 2**32 - 8, 2**32 - 520, 2**40])
    def test_random_numbers_of_far_elements(self, kernels, first):
        rng = random.Random(first)
        for name in ("span", "mask"):
            job = make_job(rng, name, 1203, 5, out_dtype=torch.bfloat16, device=self.device)
            if isinstance(job.table, Mask):
                levels = (2**31, KEEP_ALL, 2**30, 0, 2**29)
                plain = dataclasses.replace(job.table, rank_steps=(), ranks=(), keep_levels=levels)
                job = dataclasses.replace(job, table=plain)
            assert_same(kernels, [dataclasses.replace(job, first=first, dither=OTHER_KEY)])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_is_not_finite_is_told(self, kernels, dtype):
        for place in (0, 700, 1290):
            for wrong in (math.nan, math.inf, -math.inf):
                for elect in (False, True):
                    base, source = torch.zeros(1291), torch.ones(1291)
                    source[place] = wrong
                    mask = Mask(
                        (1.0,), (1.0,), (0.5,), (KEEP_ALL,), KEY, elect=elect, normalize=elect
                    )
                    out = poisoned(1291, dtype, self.device)
                    sources = [source.to(self.device)]
                    job = KernelJob(mask, base.to(self.device), sources, out)
                    (written,) = kernels.carry_out_all([job])
                    assert not written.is_finite
                    assert out.isfinite().sum() == 1290

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_rounding_ties_and_overflow(self, kernels, dtype):
        """Numbers halfway between two of the output's, next to them, and beyond its largest."""
        step = torch.arange(2**12, dtype=torch.int32, device=self.device)
        halfway = (step << 19) + (1 << (15 if dtype is torch.bfloat16 else 12))
        numbers = torch.cat([halfway + nudge for nudge in (-1, 0, 1)]).view(torch.float32)
        numbers = torch.cat([numbers, -numbers])
        numbers = numbers[numbers.isfinite()]
        assert_same(
            kernels,
            [KernelJob(Span((1.0,)), None, [numbers], poisoned(len(numbers), dtype, self.device))],
        )


def method_job(method, number, shape, dtype, device="cpu"):
    """A job of a method's table, with the statistics of its tensors."""
    base, parents = make_tensors(number, shape, dtype, seed=math.prod(shape))
    flat = [parent.reshape(-1).to(device) for parent in parents]
    has_base = method.has_deltas(True)
    base_P = base.reshape(-1).to(device) if has_base else None
    names = tuple(f"parent-{i}" for i in range(number))
    statistics = TensorStatistics(
        NAME,
        base_P,
        flat,
        "base" if has_base else None,
        names,
        SEED,
        StatisticsCache(),
        shape=shape,
    )
    table = method.table(make_values(method, number), statistics)
    return KernelJob(table, base_P, flat, poisoned(len(flat[0]), dtype, device))
