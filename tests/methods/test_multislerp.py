import pytest
import torch

from evomerge.errors import MergeError
from evomerge.methods import METHODS
from tests.contracts.merge_method import NAME, make_tensors, make_values, run, without_base

ON_DELTAS = METHODS["multislerp"]
PLAIN = without_base(ON_DELTAS)


def mean(models, weights, method=PLAIN, base=None, **changes):
    base = torch.zeros_like(models[0]) if base is None else base
    values = make_values(method, len(models), weight=weights, **changes)
    return run(method, values, base, models)


def test_one_model_comes_back_bit_for_bit():
    base, (model,) = make_tensors(1, 500)
    for method in (PLAIN, ON_DELTAS):
        assert torch.equal(mean([model], (0.3,), method, base), model)


@pytest.mark.parametrize("method", [PLAIN, ON_DELTAS], ids=["models", "deltas"])
def test_all_weight_on_one_model_gives_that_model(method):
    base, models = make_tensors(3, 500)
    out = mean(models, (0.0, 2.0, 0.0), method, base)
    # eps keeps the direction a hair from a unit vector
    assert torch.allclose(out, models[1], rtol=3e-7, atol=1e-8)


def test_models_of_one_norm_keep_it():
    _, models = make_tensors(3, 500, distance=0.1)
    models = [model / model.norm() * 3 for model in models]
    assert mean(models, (0.2, 0.3, 0.5)).norm().item() == pytest.approx(3.0, rel=1e-6)


def test_the_direction_is_the_mean_of_the_directions():
    """One step at the mean itself: the tangents to the models cancel only for equal weights."""
    x, y = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])
    out = mean([x, y], (1.0, 1.0))
    assert out.tolist() == pytest.approx([2.5 * 0.5**0.5] * 2, rel=1e-6)


def test_two_models_that_cancel_are_refused():
    x = torch.tensor([1.0, -2.0, 0.5])
    with pytest.raises(MergeError, match=rf"^{NAME}: .*parent-0, parent-1 add up to nothing"):
        mean([x, -3 * x], (0.5, 0.5))


def test_more_models_that_cancel_are_refused_with_tensor_and_norm():
    x = torch.tensor([1.0, -2.0, 0.5])
    with pytest.raises(MergeError, match=rf"^{NAME}: .*parent-0, parent-1, parent-2 .*norm .*eps"):
        mean([x, x, -x], (0.5, 0.5, 1.0))


def test_models_that_equal_their_base_leave_it():
    base, _ = make_tensors(1, 50)
    assert torch.equal(
        mean([base.clone() for _ in range(3)], (0.2, 0.3, 0.5), ON_DELTAS, base), base
    )


def test_weights_that_cannot_be_normalized_are_refused():
    cancel = {"weight": (0.5, -0.5)}
    assert "add up to 0" in PLAIN.refuse(make_values(PLAIN, 2, **cancel))
    assert PLAIN.refuse(make_values(PLAIN, 2, **cancel, normalize_weights=False)) is None
    assert PLAIN.refuse(make_values(PLAIN, 1, weight=(0.0,))) is None


@pytest.mark.parametrize("method", [PLAIN, ON_DELTAS], ids=["models", "deltas"])
def test_a_rotation_of_the_models_rotates_the_merge(method):
    base, models = make_tensors(3, 64)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    merged = mean(models, (0.2, 0.3, 0.6), method, base)
    turned = mean([turn @ model for model in models], (0.2, 0.3, 0.6), method, turn @ base)
    assert torch.allclose(turned, turn @ merged, atol=1e-6)
