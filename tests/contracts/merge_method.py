"""What every merge method promises; `tests/methods/test_methods.py` runs each row through it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from evomerge.config.mergekit import RANDOM_METHODS
from evomerge.kernels import reference
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.methods.method import Values
from tests.contracts.textbook import ROUNDING, TEXTBOOK, random_words

SEED, NAME = 7, "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (4097,), (61, 33), (40, 1), (9, 20, 11)]


def make_tensors(num_parents, shape, dtype=torch.float32, seed=0, distance=0.02):
    """A base and parents near it, of a shape or flat."""
    shape = (shape,) if isinstance(shape, int) else shape
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.05
    noise = torch.randn(num_parents, *shape, generator=generator) * distance
    return base.to(dtype), [(base + row).to(dtype) for row in noise]


def make_values(method, num_parents, **changes):
    """Values unlike each other and unlike the defaults' special cases; `changes` replace some."""
    chosen = {
        "weight": (0.6, 0.3, 0.45, 0.2, 0.7),
        "density": (0.5, 0.8, 0.31, 1.0, 0.64),
        "scale": (0.7,) * 5,
        "lambda": 0.9,
        "t": 0.3,
        **TEXTBOOK[method.name].values,
        **changes,
    }
    values = {param.name: chosen.get(param.name, param.default) for param in method.params}
    own = {param.name for param in method.params if param.per_model}
    return Values(
        per_model={name: for_each(values[name], num_parents) for name in own},
        shared={name: for_all(value) for name, value in values.items() if name not in own},
    )


def for_each(value, num_parents):
    return value[:num_parents] if isinstance(value, tuple) else (value,) * num_parents


def for_all(value):
    return value[0] if isinstance(value, tuple) else value


def run(
    method,
    values,
    base,
    parents,
    out_dtype=torch.float32,
    cache=None,
    threshold_ties="keep",
    **options,
):
    """Merge tensors; the output starts as NaN, so that what is not written shows."""
    shape = tuple(parents[0].shape)
    flat = [parent.reshape(-1) for parent in parents]
    base_P = base.reshape(-1) if method.has_deltas(True) else None
    base_name = "base" if method.has_deltas(True) else None
    names = tuple(f"parent-{i}" for i in range(len(parents)))
    statistics = TensorStatistics(
        NAME,
        base_P,
        flat,
        base_name,
        names,
        SEED,
        cache or StatisticsCache(),
        shape=shape,
        threshold_ties=threshold_ties,
    )
    out_P = torch.full((len(flat[0]),), math.nan, dtype=out_dtype)
    reference.carry_out(method.table(values, statistics), base_P, flat, out_P, **options)
    return out_P.reshape(shape)


def expected(method, values, base, parents):
    """The textbook's merge, the tolerance of a float32 one, and which elements it covers.

    Every product, sum and quotient errs by `ROUNDING` of a number no larger than the bound; with M
    models there are no more than 2 M + 8 of them one after another, coefficients included, and what
    the textbook's entry adds.
    """
    entry = TEXTBOOK[method.name]
    words = random_words(SEED, NAME, len(parents), base.numel()).reshape(-1, *base.shape)
    doubles = [parent.double().numpy() for parent in parents]
    start = base.double().numpy() if method.has_deltas(True) else None
    merged, bound, doubtful = entry.run(start, doubles, values, words)
    return merged, roundings(method, len(parents)) * ROUNDING * bound, ~doubtful


def roundings(method, num_parents):
    """How many operations follow one another at most."""
    return 2 * num_parents + 8 + TEXTBOOK[method.name].extra_roundings


def is_close(merged, tolerance, covered, out):
    """Whether every covered element is within the tolerance, the output's own rounding included."""
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[out.dtype]
    exponent = np.maximum(np.frexp(merged)[1], -13 if out.dtype is torch.float16 else -125)
    half_ulp = 0.0 if out.dtype is torch.float32 else 2.0 ** (exponent - digits - 1)
    error = np.abs(out.double().numpy() - merged)
    return bool((error <= tolerance + half_ulp * 1.0001)[covered].all())


def without_base(method):
    """The method as a recipe uses it that gives no base; only for those whose base is optional."""
    assert method.base == "optional"
    return dataclasses.replace(method, base="listed")


class MergeMethodContract:
    """Give a fixture `method`; `without_base` makes another one of a method with optional base."""

    def num_parents(self, method, wanted=3):
        return max(min(wanted, method.max_parents or wanted), method.min_parents)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_agrees_with_the_textbook(self, method, dtype, shape):
        for number in {self.num_parents(method, 3), self.num_parents(method, 5)}:
            base, parents = make_tensors(number, shape, dtype, seed=math.prod(shape))
            exact = {} if dtype is torch.float32 else TEXTBOOK[method.name].exact
            values = make_values(method, number, **exact)
            merged, tolerance, covered = expected(method, values, base, parents)
            assert covered.mean() > 0.99
            assert is_close(merged, tolerance, covered, run(method, values, base, parents))
            out = run(method, values, base, parents, out_dtype=dtype)
            assert is_close(merged, tolerance, covered, out)

    def test_tolerance_notices_what_is_wrong(self, method):
        base, parents = make_tensors(self.num_parents(method), (61, 67))
        values = make_values(method, len(parents))
        known = expected(method, values, base, parents)
        out = run(method, values, base, parents)
        assert is_close(*known, out)
        assert not is_close(*known, torch.zeros_like(out))
        assert not is_close(*known, base)
        assert not is_close(*known, parents[0])
        assert not is_close(*known, out * (1 + 2e-6))

    def test_other_parameters_agree_with_the_textbook(self, method):
        number = self.num_parents(method)
        base, parents = make_tensors(number, (33, 61), seed=3)
        changes = [
            {"weight": (0.6, -0.3, 0.45)},
            {"normalize": True},
            {"normalize": False},
            {"rescale": True},
            {"rescale": False},
            {"lambda": -0.5},
            {"density": (0.0, 1.0, 0.001)},
            {"t": 0.9},
            *TEXTBOOK[method.name].changes,
        ]
        for change in changes:
            values = make_values(method, number, **change)
            if method.refuse(values):
                continue
            merged, tolerance, covered = expected(method, values, base, parents)
            out = run(method, values, base, parents)
            assert is_close(merged, tolerance, covered, out), change

    def test_identical_models_stay_what_they_are(self, method):
        base, _ = make_tensors(1, 1000)
        parents = [base.clone() for _ in range(self.num_parents(method))]
        values = make_values(method, len(parents), scale=(1.0,))
        out = run(method, values, base, parents)
        # where coefficients add up to 1 they do so within one rounding each, else nothing is added
        limit = roundings(method, len(parents)) * ROUNDING * base.abs()
        assert bool(((out - base).abs() <= limit).all())
        half = base.bfloat16()
        halves = [half.clone() for _ in parents]
        assert torch.equal(run(method, values, half, halves, torch.bfloat16), half)

    @pytest.mark.parametrize("number", [0.0, 0.5, -0.06])
    def test_equal_elements_are_a_merge_too(self, method, number):
        """Nothing to rank, no variance, no direction: every tie there can be."""
        base = torch.full((6, 5), number)
        parents = [base + 0.01 * i for i in range(1, 1 + self.num_parents(method))]
        values = make_values(method, len(parents))
        merged, tolerance, covered = expected(method, values, base, parents)
        assert is_close(merged, tolerance, covered, run(method, values, base, parents))

    def test_chunks_and_threads_do_not_matter(self, method):
        base, parents = make_tensors(self.num_parents(method, 5), (7, 5003))
        values = make_values(method, len(parents))
        whole = run(method, values, base, parents, chunk=10**9)
        for chunk in (1001, 2**15):
            assert torch.equal(run(method, values, base, parents, chunk=chunk), whole)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - min(threads, 2))
            assert torch.equal(run(method, values, base, parents), whole)
        finally:
            torch.set_num_threads(threads)

    def test_inputs_are_not_written_to(self, method):
        base, parents = make_tensors(self.num_parents(method), (9, 37))
        copies = [tensor.clone() for tensor in (base, *parents)]
        run(method, make_values(method, len(parents)), base, parents)
        assert all(map(torch.equal, (base, *parents), copies))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_the_result_is_rounded_once(self, method, dtype):
        base, parents = make_tensors(self.num_parents(method), (61, 67))
        values = make_values(method, len(parents))
        precise = run(method, values, base, parents)
        assert not torch.equal(precise.to(dtype).float(), precise)
        assert torch.equal(run(method, values, base, parents, dtype), precise.to(dtype))
        half, halves = base.to(dtype), [parent.to(dtype) for parent in parents]
        precise = run(method, values, half, halves)
        assert torch.equal(run(method, values, half, halves, dtype), precise.to(dtype))

    def test_order_of_models_matters_only_to_the_last_bits(self, method):
        number = self.num_parents(method)
        base, parents = make_tensors(number, (61, 67))
        values = make_values(method, number)
        back = Values({n: v[::-1] for n, v in values.per_model.items()}, values.shared)
        merged, tolerance, covered = expected(method, values, base, parents)
        turned = run(method, back, base, parents[::-1])
        # masks belong to positions
        assert is_close(merged, tolerance, covered, turned) is not (
            method.random_masks and number > 1
        )

    def test_what_a_search_has_found_out_changes_no_bit(self, method):
        base, parents = make_tensors(self.num_parents(method), (61, 67))
        cache = StatisticsCache()
        for density in ((0.5, 0.8, 0.3), (0.2, 0.9, 1.0), (0.5, 0.8, 0.3)):
            values = make_values(method, len(parents), density=density)
            warm = run(method, values, base, parents, cache=cache)
            assert torch.equal(warm, run(method, values, base, parents))

    def test_ties_at_a_threshold_matter_to_the_methods_that_say_so(self, method):
        # so near that most task vectors' elements equal others
        number = self.num_parents(method)
        base, parents = make_tensors(number, (61, 67), torch.bfloat16, distance=2e-4)
        values = make_values(method, number, density=(0.37, 0.5, 0.2, 0.6, 0.3))
        plain, index, hashed = (
            run(method, values, base, parents, threshold_ties=policy)
            for policy in ("keep", "index", "hash")
        )
        assert torch.equal(plain, index) is not method.has_threshold
        assert torch.equal(plain, hashed) is not method.has_threshold

    def test_dtypes_may_differ_between_models(self, method):
        base, parents = make_tensors(self.num_parents(method), (40, 25))
        mixed = [parent.to(dtype) for parent, dtype in zip(parents, DTYPES[1:] * 2, strict=False)]
        values = make_values(method, len(mixed))
        merged, tolerance, covered = expected(method, values, base, mixed)
        assert is_close(merged, tolerance, covered, run(method, values, base, mixed))

    def test_parameters_are_declared_soundly(self, method):
        names = [param.name for param in method.params]
        assert len(set(names)) == len(names)
        for param in method.params:
            assert param.meaning
            assert param.default is None or param.low <= param.default <= param.high
            if param.search is not None:
                assert param.low <= param.search[0] < param.search[1] <= param.high
        assert method.source.startswith("https://")
        assert method.random_masks == (method.name in RANDOM_METHODS)
