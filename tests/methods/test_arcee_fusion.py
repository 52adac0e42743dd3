import torch

from evomerge.methods import METHODS
from evomerge.methods.arcee_fusion import threshold
from tests.contracts.merge_method import make_tensors, make_values, run

ARCEE_FUSION = METHODS["arcee_fusion"]


def fused(base, model):
    return run(ARCEE_FUSION, make_values(ARCEE_FUSION, 1), base, [model])


def test_every_element_is_the_base_or_the_model():
    base, (model,) = make_tensors(1, (40, 50))
    out = fused(base, model)
    # a task vector is subtracted and added again
    taken = (out - model).abs() < 2e-8
    assert bool((taken | (out == base)).all())
    assert 0 < taken.sum() < 0.3 * taken.numel()


def test_the_largest_changes_of_a_row_are_taken():
    base, (model,) = make_tensors(1, 500)
    taken = fused(base, model) != base
    sizes = (model - base).abs()
    assert sizes[taken].min() > sizes[~taken].max()


def test_rows_whose_softmax_hardly_moves_are_left():
    base, (model,) = make_tensors(1, (2, 500))
    model[1] = base[1] + 1e-3 * (model[1] - base[1])
    model[1] += 5.0  # a constant does not change a softmax
    out = fused(base, model)
    assert torch.equal(out[1], base[1])
    assert not torch.equal(out[0], base[0])


def test_quantiles_are_elements_by_rounded_down_position():
    # of 0 to 9: positions 2, 4 and 6 of 9
    assert threshold(torch.arange(10.0).flip(0)).item() == 4 + 1.5 * (6 - 2)


def test_quantiles_are_exact_in_large_tensors_too():
    size = 1_000_003
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    first, median, third = (int(q * (size - 1)) for q in (0.25, 0.5, 0.75))
    assert threshold(shuffled).item() == median + 1.5 * (third - first)
