"""What every merge method promises; `tests/methods/test_methods.py` runs each row through it."""

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


def make_tensors(num_parents, size, dtype=torch.float32, seed=0, distance=0.02):
    """A base and parents near it, as flat tensors."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator) * 0.05
    noise = torch.randn(num_parents, size, generator=generator) * distance
    return base.to(dtype), [(base + row).to(dtype) for row in noise]


def make_values(method, num_parents, **changes):
    """Values unlike each other and unlike the defaults' special cases; `changes` replace some."""
    chosen = {
        "weight": (0.6, 0.3, 0.45, 0.2, 0.7),
        "density": (0.5, 0.8, 0.31, 1.0, 0.64),
        "scale": (0.7,) * 5,
        "lambda": 0.9,
        "t": 0.3,
        **changes,
    }
    values = {param.name: chosen.get(param.name, param.default) for param in method.params}
    own = {param.name for param in method.params if param.per_model}
    return Values(
        per_model={name: tuple(values[name])[:num_parents] for name in own},
        shared={name: value for name, value in values.items() if name not in own},
    )


def run(method, values, base, parents, out_dtype=torch.float32, cache=None, **options):
    """Merge flat tensors; the output starts as NaN, so that what is not written shows."""
    base = base if method.has_deltas(True) else None
    names = tuple(f"parent-{i}" for i in range(len(parents)))
    statistics = TensorStatistics(
        NAME, base, parents, "base", names, SEED, cache or StatisticsCache()
    )
    out = torch.full((len(parents[0]),), math.nan, dtype=out_dtype)
    reference.carry_out(method.table(values, statistics), base, parents, out, **options)
    return out


def expected(method, values, base, parents):
    """The textbook's merge, the tolerance of a float32 one, and which elements it covers.

    Every product, sum and quotient errs by `ROUNDING` of a number no larger than the bound; with M
    models there are no more than 2 M + 8 of them one after another, coefficients included.
    """
    words = random_words(SEED, NAME, len(parents), len(base))
    doubles = [parent.double().numpy() for parent in parents]
    merged, bound, doubtful = TEXTBOOK[method.name](base.double().numpy(), doubles, values, words)
    return merged, (2 * len(parents) + 8) * ROUNDING * bound, ~doubtful


def is_close(merged, tolerance, covered, out):
    """Whether every covered element is within the tolerance, the output's own rounding included."""
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[out.dtype]
    exponent = np.maximum(np.frexp(merged)[1], -13 if out.dtype is torch.float16 else -125)
    half_ulp = 0.0 if out.dtype is torch.float32 else 2.0 ** (exponent - digits - 1)
    error = np.abs(out.double().numpy() - merged)
    return bool((error <= tolerance + half_ulp * 1.0001)[covered].all())


class MergeMethodContract:
    """Give a fixture `method`."""

    def num_parents(self, method, wanted=3):
        return min(wanted, method.max_parents or wanted)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [1, 7, 4097])
    def test_agrees_with_the_textbook(self, method, dtype, size):
        for number in {self.num_parents(method, 3), self.num_parents(method, 5)}:
            base, parents = make_tensors(number, size, dtype, seed=size)
            # densities of 1 where magnitudes decide: half precision rounds them, the textbook not
            exact = {} if method.random_masks or dtype is torch.float32 else {"density": (1.0,) * 5}
            values = make_values(method, number, **exact)
            merged, tolerance, covered = expected(method, values, base, parents)
            assert covered.mean() > 0.99
            assert is_close(merged, tolerance, covered, run(method, values, base, parents))
            out = run(method, values, base, parents, out_dtype=dtype)
            assert is_close(merged, tolerance, covered, out)

    def test_tolerance_notices_what_is_wrong(self, method):
        base, parents = make_tensors(self.num_parents(method), 4097)
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
        base, parents = make_tensors(number, 2049, seed=3)
        changes = [
            {"weight": (0.6, -0.3, 0.45)},
            {"normalize": True},
            {"normalize": False},
            {"rescale": True},
            {"rescale": False},
            {"lambda": -0.5},
            {"density": (0.0, 1.0, 0.001)},
            {"t": 0.9},
        ]
        for change in changes:
            values = make_values(method, number, **change)
            merged, tolerance, covered = expected(method, values, base, parents)
            out = run(method, values, base, parents)
            assert is_close(merged, tolerance, covered, out), change

    def test_identical_models_stay_what_they_are(self, method):
        base, _ = make_tensors(1, 1000)
        parents = [base.clone() for _ in range(self.num_parents(method))]
        values = make_values(method, len(parents), scale=(1.0,))
        out = run(method, values, base, parents)
        # where coefficients add up to 1 they do so within one rounding each, else nothing is added
        limit = (len(parents) + 2) * ROUNDING * base.abs()
        assert bool(((out - base).abs() <= limit).all())
        assert torch.equal(run(method, values, base.bfloat16(), [p.bfloat16() for p in parents],
                               torch.bfloat16), base.bfloat16())  # fmt: skip

    def test_chunks_and_threads_do_not_matter(self, method):
        base, parents = make_tensors(self.num_parents(method, 5), 70_001)
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
        base, parents = make_tensors(self.num_parents(method), 333)
        copies = [tensor.clone() for tensor in (base, *parents)]
        run(method, make_values(method, len(parents)), base, parents)
        assert all(map(torch.equal, (base, *parents), copies))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_the_result_is_rounded_once(self, method, dtype):
        base, parents = make_tensors(self.num_parents(method), 4097, dtype)
        values = make_values(method, len(parents))
        precise = run(method, values, base, parents)
        assert torch.equal(run(method, values, base, parents, dtype), precise.to(dtype))
        assert not torch.equal(precise.to(dtype).float(), precise)

    def test_order_of_models_matters_only_to_the_last_bits(self, method):
        number = self.num_parents(method)
        base, parents = make_tensors(number, 4097)
        values = make_values(method, number)
        back = Values({n: v[::-1] for n, v in values.per_model.items()}, values.shared)
        merged, tolerance, covered = expected(method, values, base, parents)
        turned = run(method, back, base, parents[::-1])
        # masks belong to positions
        assert is_close(merged, tolerance, covered, turned) is not (
            method.random_masks and number > 1
        )

    def test_what_a_search_has_found_out_changes_no_bit(self, method):
        base, parents = make_tensors(self.num_parents(method), 4097)
        cache = StatisticsCache()
        for density in ((0.5, 0.8, 0.3), (0.2, 0.9, 1.0), (0.5, 0.8, 0.3)):
            values = make_values(method, len(parents), density=density)
            warm = run(method, values, base, parents, cache=cache)
            assert torch.equal(warm, run(method, values, base, parents))

    def test_dtypes_may_differ_between_models(self, method):
        base, parents = make_tensors(self.num_parents(method), 1000)
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
