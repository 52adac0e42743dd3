import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

SCE = METHODS["sce"]


def merged(deltas, share=1.0):
    parents = [torch.tensor(delta) for delta in deltas]
    values = make_values(SCE, len(parents), select_topk=share)
    return run(SCE, values, torch.zeros_like(parents[0]), parents).tolist()


def test_weights_are_mean_squares_and_minorities_are_left_out():
    deltas = [[3.0, 1.0, 0.0, 0.0], [1.0, -2.0, 0.0, 1.0]]  # energies 10 and 6
    assert merged(deltas) == pytest.approx([(10 * 3 + 6 * 1) / 16, -2.0, 0.0, 1.0], rel=1e-6)


def test_elements_that_vary_most_are_selected_and_weights_follow_them():
    deltas = [[9.0, 1.0, 2.0, 0.0], [9.0, 3.0, 6.0, 0.0]]  # variances 0, 1, 4, 0
    assert merged(deltas, 0.5) == pytest.approx([0.0, 0.0, (4 * 2 + 36 * 6) / 40, 0.0], rel=1e-6)
    # a share of those that vary at all
    assert merged(deltas, 0.99)[1] == 0.0
    assert merged(deltas, 0.4) == [0.0] * 4


def test_equal_variances_are_kept_together():
    deltas = [[1.0, 3.0, 2.0], [2.0, 4.0, 3.0]]
    assert merged(deltas, 0.4) == merged(deltas, 1.0)


def test_tiny_task_vectors_get_equal_weights():
    small = [[1e-4, 1e-4], [3e-4, 3e-4]]
    assert merged(small) == pytest.approx([2e-4] * 2, rel=1e-6)
    assert merged([[1.0, 1.0], [3.0, 3.0]]) == pytest.approx([2.8] * 2, rel=1e-6)


def test_equal_parents_are_the_merge():
    base, (parent,) = make_tensors(1, 5000)
    out = run(SCE, make_values(SCE, 3, select_topk=1.0), base, [parent] * 3)
    assert torch.allclose(out, parent, rtol=1e-6, atol=1e-8)
