"""What methods with task vectors promise alike: where they leave the base, and reach the parent."""

import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run


def methods_with(name):
    """The methods with task vectors that have a parameter."""
    found = [m for m in METHODS.values() if m.needs_base and name in {p.name for p in m.params}]
    assert found
    return pytest.mark.parametrize("method", found, ids=lambda method: method.name)


def settings_of(method):
    """Nothing dropped, nothing scaled: the plainest merge."""
    plain = {"density": (1.0,) * 3, "weight": (1.0,) * 3, "lambda": 1.0}
    names = {param.name for param in method.params}
    return {name: value for name, value in plain.items() if name in names}


@methods_with("weight")
@pytest.mark.parametrize("number", [2, 3])
def test_weights_of_0_leave_the_base(method, number):
    base, parents = make_tensors(number, (40, 25))
    values = make_values(method, number, weight=(0.0,) * number)
    assert torch.equal(run(method, values, base, parents), base)


@methods_with("lambda")
def test_a_lambda_of_0_leaves_the_base(method):
    base, parents = make_tensors(3, (40, 25))
    values = make_values(method, 3, **{"lambda": 0.0})
    assert torch.equal(run(method, values, base, parents), base)


@pytest.mark.parametrize(
    "name",
    ["task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
     "breadcrumbs_ties", "sce"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_whole_task_vector_leads_to_its_parent(name, dtype):
    method = METHODS[name]
    base, (parent,) = make_tensors(1, (40, 25), dtype)
    settings = {**settings_of(method), "select_topk": 1.0}
    out = run(method, make_values(method, 1, **settings), base, [parent], dtype)
    assert torch.equal(out, parent)


@pytest.mark.parametrize("name", ["ties", "della", "dare_ties", "breadcrumbs_ties", "sce", "ram"])
def test_equal_parents_are_their_mean(name):
    method = METHODS[name]
    base, (parent,) = make_tensors(1, (40, 25), torch.bfloat16)
    settings = {**settings_of(method), "normalize": True, "select_topk": 1.0, "epsilon": 0.0}
    out = run(method, make_values(method, 3, **settings), base, [parent] * 3, torch.bfloat16)
    assert torch.equal(out, parent)
