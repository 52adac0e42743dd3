"""All thresholds of a tensor at once are those that are found one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.kernels.histograms import count_keys
from evomerge.kernels.ladders import ladder_of
from evomerge.kernels.statistics import TensorStatistics

densities = st.floats(0.0, 1.0) | st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0])


def statistics(base, *parents, size=257):
    """Facts on task vectors with many ties, zeros among them; a dtype for the base and parents."""
    tensors = [
        torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(8).round().div(64)
        for seed in range(len(parents) + 1)
    ]
    base_P = tensors[0].to(base)
    sources = [tensor.to(dtype) for tensor, dtype in zip(tensors[1:], parents, strict=True)]
    return TensorStatistics("tensor", base_P, sources, "base", tuple(map(str, range(len(parents)))))


def one_by_one(facts, chosen):
    return tuple(facts.threshold(model, density) for model, density in enumerate(chosen))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,) * 4,
        (torch.float16,) * 4,
        (torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float32,) * 4,
    ],
    ids=["bfloat16", "float16", "one compared in float32", "float32"],
)
@settings(max_examples=25)
@given(chosen=st.tuples(densities, densities, densities))
def test_any_densities_give_the_thresholds_of_each(dtypes, chosen):
    facts = statistics(*dtypes)
    assert facts.thresholds(chosen) == one_by_one(facts, chosen)


def test_every_number_of_kept_elements_is_found():
    facts = statistics(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for count in range(1, 257):
        chosen = ((count + 0.5) / 257, (257.5 - count) / 257)
        assert facts.thresholds(chosen) == one_by_one(facts, chosen)


def test_nothing_and_everything_have_no_threshold_of_their_own():
    facts = statistics(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    assert facts.thresholds((0.0, 1.0)) == (math.inf, 0.0)


def test_an_empty_tensor_keeps_everything():
    facts = statistics(torch.bfloat16, torch.bfloat16, size=0)
    assert facts.thresholds((0.5,)) == (0.0,)


def test_models_do_not_reach_into_one_another():
    """The last elements of the first model and the first of the second lie side by side."""
    dtype, magnitudes = torch.bfloat16, torch.tensor([4.0, 2.0, 1.0])
    first = count_keys([magnitudes], dtype)
    second = count_keys([magnitudes * 16], dtype)
    ladder = ladder_of(3, [first, second], [dtype, dtype])
    # half-way to the next smaller bfloat16, which is 2**-8 of a power of two below it
    below = 1 - 2.0**-9
    assert ladder.at((0.9999, 0.0001)) == (2.0 * below, 64.0 * below)
    assert ladder.at((0.34, 0.67)) == (4.0 * below, 32.0 * below)
