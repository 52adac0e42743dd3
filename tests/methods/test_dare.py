import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

DARE_LINEAR, DARE_TIES = METHODS["dare_linear"], METHODS["dare_ties"]
BOTH = pytest.mark.parametrize("method", [DARE_LINEAR, DARE_TIES], ids=lambda method: method.name)


def kept_mask(base, parents, position, density, **changes):
    """Where the task vector at a position shows, when the others have weight 0."""
    weights = [0.0] * len(parents)
    weights[position] = 1.0
    densities = (density,) * len(parents)
    values = make_values(
        DARE_LINEAR, len(parents), weight=tuple(weights), density=densities, **changes
    )
    return run(DARE_LINEAR, values, base, parents) != base


def test_density_one_is_task_arithmetic_bit_for_bit():
    base, parents = make_tensors(3, 5000)
    plain = METHODS["task_arithmetic"]
    for normalize in (False, True):
        whole = make_values(DARE_LINEAR, 3, density=(1.0,) * 3, normalize=normalize)
        expected = run(plain, make_values(plain, 3, normalize=normalize), base, parents)
        assert torch.equal(run(DARE_LINEAR, whole, base, parents), expected)


def test_density_one_is_ties_bit_for_bit():
    base, parents = make_tensors(3, 5000)
    whole = {"density": (1.0,) * 3, "normalize": False}
    expected = run(METHODS["ties"], make_values(METHODS["ties"], 3, **whole), base, parents)
    assert torch.equal(run(DARE_TIES, make_values(DARE_TIES, 3, **whole), base, parents), expected)


@BOTH
def test_density_zero_leaves_the_base(method):
    base, parents = make_tensors(2, 1000)
    values = make_values(method, 2, density=(0.0, 0.0))
    assert torch.equal(run(method, values, base, parents), base)


def test_more_density_keeps_what_less_density_kept():
    base, parents = make_tensors(6, 20_000)
    before = torch.zeros(20_000, dtype=torch.bool)
    for density in (0.0, 0.1, 0.3, 0.3001, 0.9, 1.0):
        mask = kept_mask(base, parents, 5, density)
        assert not bool((before & ~mask).any())
        assert abs(mask.float().mean() - density) < 0.015  # 4 standard errors
        before = mask


def test_appending_a_parent_leaves_the_masks_of_the_others():
    base, parents = make_tensors(6, 5000)
    for position in range(4):
        few = kept_mask(base, parents[: position + 1], position, 0.5)
        for number in (position + 2, 6):
            assert torch.equal(kept_mask(base, parents[:number], position, 0.5), few)


def test_masks_of_models_are_independent():
    base, parents = make_tensors(6, 20_000)
    masks = torch.stack([kept_mask(base, parents, i, 0.5) for i in range(6)]).float()
    correlation = torch.corrcoef(masks) - torch.eye(6)
    assert correlation.abs().max() < 0.04  # 5 standard errors of 20 000 draws


def test_survivors_have_the_l1_norm_of_the_task_vector():
    base = torch.zeros(5000)
    _, parents = make_tensors(1, 5000)
    alone = {"weight": (1.0,), "density": (0.2,), "lambda": 1.0}
    merged = run(DARE_LINEAR, make_values(DARE_LINEAR, 1, **alone), base, parents)
    norm = parents[0].double().abs().sum().item()
    assert merged.double().abs().sum().item() == pytest.approx(norm, rel=1e-6)
    kept = run(DARE_LINEAR, make_values(DARE_LINEAR, 1, **alone, rescale=False), base, parents)
    assert torch.equal(kept, torch.where(merged != 0, parents[0], 0.0))


def test_merge_is_unbiased_over_tensors():
    """Means over many masks come to the merge without dropping (L1 rescaling, large tensor)."""
    base, parents = make_tensors(2, 200_000)
    values = make_values(DARE_LINEAR, 2, density=(0.3, 0.6))
    whole = make_values(DARE_LINEAR, 2, density=(1.0, 1.0))
    dropped = run(DARE_LINEAR, values, base, parents) - base
    expected = run(DARE_LINEAR, whole, base, parents) - base
    slope = (dropped @ expected) / (expected @ expected)
    assert slope.item() == pytest.approx(1.0, abs=0.02)
    assert dropped.std() > 1.3 * expected.std()
