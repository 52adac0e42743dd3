import pytest
import torch

from evomerge.kernels.statistics import StatisticsCache
from evomerge.methods import METHODS
from evomerge.methods.tsv import merged_directions, orthogonal
from tests.contracts.merge_method import make_tensors, make_values, run

TSV = METHODS["tsv"]


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)], ids=str)
def test_the_nearest_orthonormal_matrix(shape):
    matrix = random(shape)
    nearest = orthogonal(matrix)
    small = nearest.T @ nearest if shape[0] >= shape[1] else nearest @ nearest.T
    assert torch.allclose(small, torch.eye(min(shape)).double(), atol=1e-12)
    # nearest: turning it by any rotation does not come closer, so the product is symmetric
    product = nearest.T @ matrix
    assert torch.allclose(product, product.T, atol=1e-12)


def test_one_model_with_all_directions_is_that_model():
    base, (parent,) = make_tensors(1, (30, 20))
    out = run(TSV, make_values(TSV, 1, **{"lambda": 1.0}), base, [parent])
    assert torch.allclose(out, parent, rtol=0, atol=2e-8)


def test_one_model_with_some_directions_is_its_best_approximation_of_that_rank():
    delta = random((30, 20))
    left, value, right = torch.linalg.svd(delta, full_matrices=False)
    best = left[:, :5] * value[:5] @ right[:5]
    assert torch.allclose(merged_directions([delta], 0.25), best, atol=1e-12)


def test_task_vectors_that_do_not_meet_are_added():
    x, y = torch.zeros(8, 6).double(), torch.zeros(8, 6).double()
    x[:4, :3], y[4:, 3:] = random((4, 3)), random((4, 3), seed=1)
    assert torch.allclose(merged_directions([x, y], 0.5), x + y, atol=1e-12)


def test_merged_directions_keep_the_singular_values():
    """U and V are orthonormal, so those of the merge are those that went in."""
    deltas = [random((30, 20), seed) for seed in range(4)]
    kept = torch.cat([torch.linalg.svdvals(delta)[:5] for delta in deltas])
    found = torch.linalg.svdvals(merged_directions(deltas, 0.25))
    assert torch.allclose(found, kept.sort(descending=True).values, atol=1e-10)


def test_the_order_of_models_does_not_matter():
    deltas = [random((30, 20), seed) for seed in range(3)]
    merged = merged_directions(deltas, 1 / 3)
    assert torch.allclose(merged_directions(deltas[::-1], 1 / 3), merged, atol=1e-10)


def test_equal_and_low_rank_task_vectors_stay_within_their_directions():
    thin = random((30, 2)) @ random((2, 20), seed=1)
    assert torch.allclose(merged_directions([thin, thin], 0.5), thin, atol=1e-10)
    assert torch.equal(merged_directions([0 * thin, 0 * thin], 0.5), 0 * thin)


def test_of_vectors_the_mean_is_taken():
    base, parents = make_tensors(3, 50)
    out = run(TSV, make_values(TSV, 3, **{"lambda": 1.0}), base, parents)
    assert torch.allclose(out, sum(parents) / 3, atol=2e-8)


def test_a_search_factorises_once_and_a_merge_keeps_nothing(monkeypatch):
    base, parents = make_tensors(2, (30, 20))
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    for cache, num_calls in (
        (StatisticsCache(), 4),
        (StatisticsCache(keep_ranks=False), 12),
        (StatisticsCache(max_tensor_bytes=4 * 600 - 1), 12),
    ):
        calls.clear()
        for lam in (0.5, 1.0, 1.5):
            run(TSV, make_values(TSV, 2, **{"lambda": lam}), base, parents, cache=cache)
        assert len(calls) == num_calls
