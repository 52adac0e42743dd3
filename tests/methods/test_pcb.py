import math

import pytest
import torch

from evomerge.methods import METHODS
from evomerge.methods.pcb import exponential
from tests.contracts.merge_method import make_tensors, make_values, run

PCB = METHODS["pcb"]


@pytest.mark.parametrize("factor", [1, 2, 9])
def test_exponential_is_one(factor):
    value = torch.linspace(0, 1, 1001, dtype=torch.float64)
    expected = torch.tensor([math.exp(factor * x) for x in value.tolist()], dtype=torch.float64)
    # the series errs by 2 roundings of 1.1e-16, its fourth power by 11, and so does each factor
    assert (exponential(value, factor) / expected - 1).abs().max() < 12 * factor * 1.1e-16


def test_hand_worked_example():
    """Task vectors [1, 0] and [1, 1]: both products with the second's own are alike."""
    parents = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    values = make_values(PCB, 2, density=1.0, weight=(1.0, 1.0), **{"lambda": 1.0})
    merged = run(PCB, values, torch.zeros(2), parents).tolist()
    # own squares: [1, 0] and [1, 1]; product of the two: [1, 0]
    e, half = math.e, 0.5
    first = [e**2 / (e**2 + 1) * 2 * e / (e + 1), 1 / (e**2 + 1) * 2 / (e + 1)]
    second = [half * (e / (e + 1) + half), half * (1 / (e + 1) + half)]
    assert merged == pytest.approx([1.0, second[1] / (first[1] + second[1])], rel=1e-6)


def test_dropping_takes_the_lowest_scores():
    base, parents = make_tensors(2, 1000)
    whole = run(PCB, make_values(PCB, 2, density=1.0), base, parents)
    some = run(PCB, make_values(PCB, 2, density=0.3), base, parents)
    none = run(PCB, make_values(PCB, 2, density=0.0), base, parents)
    assert torch.equal(none, base)
    left = some == base
    # 0.7**2 of the elements lose both, were the scores independent
    assert 0.4 < left.float().mean() < 0.7
    assert (whole - base)[left].abs().mean() < (whole - base)[~left].abs().mean()


def test_equal_task_vectors_are_the_merge():
    base, (parent,) = make_tensors(1, 1000)
    values = make_values(PCB, 3, density=1.0, weight=(1.0,) * 3, **{"lambda": 1.0})
    assert torch.allclose(run(PCB, values, base, [parent] * 3), parent, rtol=1e-6, atol=1e-8)
