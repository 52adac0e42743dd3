import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

TIES = METHODS["ties"]


def merged(deltas, dtype=torch.float32, **changes):
    """TIES over task vectors given by hand, from a base of zeros."""
    parents = [torch.tensor(delta, dtype=dtype) for delta in deltas]
    values = make_values(TIES, len(parents), **{"lambda": 1.0, "density": (1.0,) * 3, **changes})
    return run(TIES, values, torch.zeros_like(parents[0]), parents).tolist()


def test_signs_are_elected_by_weighted_sum_and_losers_left_out():
    deltas = [[1.0, 1.0, -1.0, 0.0], [-0.5, -3.0, -2.0, 0.0], [2.0, 1.0, 0.0, 0.0]]
    weights = {"weight": (1.0, 1.0, 1.0)}
    assert merged(deltas, **weights) == [1.5, -3.0, -1.5, 0.0]
    assert merged(deltas, **weights, normalize=False) == [3.0, -3.0, -3.0, 0.0]
    assert merged(deltas, weight=(1.0, 6.0, 1.0))[0] == 1.5  # a tie
    assert merged(deltas, weight=(1.0, 7.0, 1.0))[0] == -0.5


def test_a_negative_weight_turns_the_vote():
    assert merged([[1.0], [3.0]], weight=(1.0, -1.0), normalize=False) == [-3.0]
    assert merged([[1.0], [3.0]], weight=(1.0, -1.0)) == [3.0]  # -3 divided by a weight of -1


def test_weights_of_the_winners_that_cancel_count_as_one():
    assert merged([[2.0], [-1.0]], weight=(1.0, -1.0)) == [3.0]


def test_lambda_scales_after_the_division():
    assert merged([[1.0], [3.0]], weight=(0.5, 0.5), **{"lambda": 0.5}) == [1.0]
    assert merged([[1.0], [-3.0]], weight=(0.5, 0.5), **{"lambda": -1.0}) == [3.0]


def test_density_keeps_the_largest_and_all_that_equal_the_last():
    deltas = [[4.0, -3.0, 2.0, -2.0, 2.0, 1.0]]
    for density, kept in (
        (0.5, [4, -3, 2, -2, 2, 0]),
        (0.4, [4, -3, 0, 0, 0, 0]),
        (0.1, [4] + [0] * 5),
    ):
        assert merged(deltas, weight=(1.0,), density=(density,)) == kept
    assert merged(deltas, weight=(1.0,), density=(0.0,)) == [0.0] * 6


def test_trimmed_elements_have_no_vote():
    deltas = [[0.1, 5.0], [-0.4, 0.2], [-0.3, 0.1]]
    kept = merged(deltas, weight=(1.0, 1.0, 1.0), density=(0.5, 1.0, 1.0))
    assert kept == pytest.approx([-0.35, (5.0 + 0.2 + 0.1) / 3], rel=1e-6)


def test_rescale_restores_the_l1_norm_of_what_was_trimmed():
    assert merged([[3.0, -1.0]], weight=(1.0,), density=(0.5,), rescale=True) == [4.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_density_keeps_what_less_density_kept(dtype):
    base, parents = make_tensors(1, 5000, dtype)
    before = torch.zeros(5000, dtype=torch.bool)
    for density in (0.0, 1e-4, 0.1, 0.5, 0.51, 1.0):
        values = make_values(TIES, 1, density=(density,), weight=(1.0,))
        changed = run(TIES, values, base, parents) != base.float()
        assert not bool((before & ~changed).any())
        assert changed.sum() >= density * 4900  # some deltas are zero in half precision
        before = changed
