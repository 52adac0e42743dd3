"""Sums of adapters as one adapter, and the nearest of a lower rank."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.adapters.adapter import Adapter, LowRank
from evomerge.adapters.open import open_model
from evomerge.adapters.stack import stack_adapters, stack_parts
from evomerge.adapters.truncate import truncate
from tests.adapters.small import layer, make_adapter, reference
from tests.tiny import make_model


def random_part(seed, rank, scale=1.0, shape=(20, 14), transposed=False):
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    a = torch.randn(rank, inputs, generator=generator)
    b = torch.randn(outputs, rank, generator=generator)
    return LowRank("m", a, b, scale, transposed)


def dense(part):
    product = part.scale * part.b_OR.double() @ part.a_RI.double()
    return product.T if part.transposed else product


def close(part, expected):
    """Within 1e-6 of the expected, relative to its largest element."""
    assert (dense(part) - expected).abs().max() <= 1e-6 * expected.abs().max()


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(-2000, 2000), st.floats(0.1, 3)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_stacked_is_the_dense_sum(parts, transposed):
    made = [
        random_part(i, rank, scale, transposed=transposed)
        for i, (rank, _, scale) in enumerate(parts)
    ]
    weights = [thousandths / 1000 for _, thousandths, _ in parts]
    stacked = stack_parts(made, weights)
    kept = [(part, weight) for part, weight in zip(made, weights, strict=True) if weight]
    if not kept:
        assert stacked is None
        return
    assert stacked.rank == sum(part.rank for part, _ in kept)
    # the terms may cancel, so the largest term is the measure
    expected = sum(weight * dense(part) for part, weight in kept)
    size = max((weight * dense(part)).abs().max() for part, weight in kept)
    assert (dense(stacked) - expected).abs().max() <= 1e-6 * size


def test_patterns_of_rank_and_alpha_and_rslora_add_up(tmp_path):
    make_model(0, tmp_path / "base")
    q0, q1, o0 = layer(0), layer(1), layer(0, "self_attn.o_proj")
    make_adapter(
        tmp_path / "a", tmp_path / "base", 1, {q0: 4, q1: 2}, rank_pattern={"1.*q_proj": 2}
    )
    make_adapter(
        tmp_path / "b",
        tmp_path / "base",
        2,
        {q0: 9, o0: 3},
        r=9,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"o_proj": 3},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 12},
    )
    sources = [open_model(reference(tmp_path / "base", tmp_path / x)) for x in "ab"]
    names = [f"{module}.weight" for module in (q0, q1, o0)]
    stacked = stack_adapters([s.adapter for s in sources], dict.fromkeys(names, (-0.7, 1.3)))
    assert {name: part.rank for name, part in stacked.items()} == dict(
        sorted(zip(names, (13, 2, 3), strict=True))
    )
    scales = {q0: (8 / 4, 12 / 3), q1: (8 / 2, 0), o0: (0, 6 / math.sqrt(3))}
    for module, pair in scales.items():
        expected = 0
        for source, weight, scale in zip(sources, (-0.7, 1.3), pair, strict=True):
            part = source.adapter.low_rank.get(f"{module}.weight")
            assert (part is None) == (scale == 0)
            if part is not None:
                expected += weight * scale * part.b_OR.double() @ part.a_RI.double()
        close(stacked[f"{module}.weight"], expected)


def test_averaging_a_with_a_and_b_with_b_is_another_model():
    """Why factors are stacked: the mean of factors has products of every B with every other A."""
    one, other = random_part(1, 3), random_part(2, 3)
    mean = 0.5 * dense(one) + 0.5 * dense(other)
    factors = LowRank("m", 0.5 * (one.a_RI + other.a_RI), 0.5 * (one.b_OR + other.b_OR), 1.0)
    close(stack_parts([one, other], [0.5, 0.5]), mean)
    error = (dense(factors) - mean).norm() / mean.norm()
    crossed = 0.25 * (one.b_OR - other.b_OR).double() @ (one.a_RI - other.a_RI).double()
    torch.testing.assert_close(dense(factors) - mean, -crossed, rtol=0, atol=1e-5)
    assert error > 0.5


def test_stacking_leaves_its_input_alone():
    part = random_part(1, 3, 2.0)
    before = part.a_RI.clone(), part.b_OR.clone()
    adapter = Adapter("x", {"m.weight": part}, {}, {}, ties_head=False)
    stack_adapters([adapter, adapter], {"m.weight": (1.0, -3.0)})
    assert torch.equal(part.a_RI, before[0])
    assert torch.equal(part.b_OR, before[1])


@pytest.mark.parametrize("rank", [1, 3, 7, 13])
@pytest.mark.parametrize("shape", [(20, 14), (5, 40), (40, 5)])
def test_truncation_is_the_best_and_its_residual_is_what_is_left_out(rank, shape):
    part = random_part(3, 14, 0.7, shape)
    cut, residual = truncate(part, rank)
    sigma = torch.linalg.svdvals(dense(part))
    left_out = float(sigma[rank:].square().sum().sqrt())
    assert residual.absolute == pytest.approx(left_out, rel=1e-9, abs=1e-12)
    assert residual.relative == pytest.approx(left_out / float(sigma.norm()), rel=1e-9, abs=1e-14)
    assert cut.rank <= rank
    # the factors are rounded to float32
    assert float((dense(cut) - dense(part)).norm()) == pytest.approx(
        left_out, rel=1e-5, abs=1e-5 * float(sigma.norm())
    )
    assert float(cut.a_RI.norm()) == pytest.approx(float(cut.b_OR.norm()), rel=1e-5)


def test_a_rank_that_is_no_larger_stays_bit_for_bit():
    part = random_part(1, 3, 2.0)
    cut, residual = truncate(part, 3)
    assert cut is part
    assert residual == (0.0, 0.0)


def test_nothing_is_cut_from_nothing():
    part = LowRank("m", torch.zeros(4, 6), torch.zeros(5, 4), 1.0)
    assert truncate(part, 2)[1] == (0.0, 0.0)
