import torch

from evomerge.methods import METHODS
from evomerge.methods.iso_c import isotropic
from tests.contracts.merge_method import make_tensors, make_values, run

ISO_C = METHODS["iso_c"]


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_singular_values_are_their_mean():
    deltas = [random((30, 20), seed) for seed in range(3)]
    values = torch.linalg.svdvals(isotropic(deltas))
    mean = torch.linalg.svdvals(sum(deltas)).mean()
    assert torch.allclose(values, mean.expand(20), rtol=1e-10)


def test_a_sum_with_equal_singular_values_is_left_as_it_is():
    turn = torch.linalg.qr(random((12, 12)))[0]
    assert torch.allclose(isotropic([turn, 2 * turn]), 3 * turn, atol=1e-12)


def test_directions_that_no_model_has_stay_absent():
    left, right = torch.linalg.qr(random((30, 2)))[0], torch.linalg.qr(random((20, 2), 1))[0]
    thin = left @ torch.diag(torch.tensor([3.0, 1.0]).double()) @ right.T
    assert torch.allclose(isotropic([thin]), 2 * left @ right.T, atol=1e-12)
    assert torch.equal(isotropic([0 * thin]), 0 * thin)


def test_lambda_scales_and_vectors_are_averaged():
    base, parents = make_tensors(3, (30, 20))
    once, twice = (
        run(ISO_C, make_values(ISO_C, 3, **{"lambda": lam}), base, parents) for lam in (1.0, 2.0)
    )
    assert torch.allclose(twice - base, 2 * (once - base), atol=1e-7)
    base, parents = make_tensors(3, 50)
    out = run(ISO_C, make_values(ISO_C, 3, **{"lambda": 1.0}), base, parents)
    assert torch.allclose(out, sum(parents) / 3, atol=2e-8)
