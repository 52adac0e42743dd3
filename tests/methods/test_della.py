import math

import pytest
import torch

from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

DELLA, LINEAR = METHODS["della"], METHODS["della_linear"]


def kept_mask(base, parent, density, epsilon):
    settings = {"weight": (1.0,), "density": (density,), "epsilon": (epsilon,)}
    return run(LINEAR, make_values(LINEAR, 1, **settings), base, [parent]) != base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chances_grow_evenly_with_rank_from_density_minus_to_density_plus_epsilon(dtype):
    """In each tenth of the ranks the share kept is the chance there, within 4.5 standard errors."""
    density, epsilon, rows = 0.4, 0.3, 64
    base = torch.zeros(rows, 2000, dtype=dtype)
    _, (parent,) = make_tensors(1, (rows, 2000), dtype, seed=11)
    # sizes of rows differ, ranks do not care
    parent = parent * torch.logspace(-3, 3, rows)[:, None].to(dtype)
    kept = kept_mask(base, parent, density, epsilon)
    order = parent.float().abs().argsort(dim=1, stable=True)
    shares = kept.gather(1, order).reshape(rows, 10, 200).float().mean((0, 2))
    for tenth, share in enumerate(shares.tolist()):
        chance = density - epsilon + 2 * epsilon * (tenth + 0.5) / 10
        deviation = math.sqrt(chance * (1 - chance) / (rows * 200))
        # chances move by up to 1/254 of their range where ranks share a byte, evenly to both sides
        assert abs(share - chance) < 4.5 * deviation + 2 * epsilon / 254
    deviation = math.sqrt(density * (1 - density) / parent.numel())
    assert abs(kept.float().mean().item() - density) < 4.5 * deviation


def test_equal_magnitudes_all_have_the_density_as_their_chance():
    base, parent = torch.zeros(300, 100), torch.ones(300, 100)
    kept = kept_mask(base, parent, 0.6, 0.3)
    same = run(
        METHODS["dare_linear"],
        make_values(METHODS["dare_linear"], 1, weight=(1.0,), density=(0.6,)),
        base,
        [parent],
    )
    # the byte's steps add up to the density within 2**-24; masks come from the same numbers
    assert (kept != (same != base)).sum() == 0


def test_a_row_goes_along_the_second_dimension():
    """Columns of a matrix with one row are ranked; rows with one column are not."""
    parent = torch.arange(1.0, 10_001.0)
    lower, upper = slice(0, 5000), slice(5000, None)
    for shape, differs in (((1, 10_000), True), ((10_000,), True), ((10_000, 1), False)):
        kept = kept_mask(torch.zeros(shape), parent.reshape(shape), 0.5, 0.4).reshape(-1).float()
        assert (kept[upper].mean() - kept[lower].mean() > 0.3).item() is differs


def test_more_density_keeps_what_less_density_kept():
    base, (parent,) = make_tensors(1, (100, 200))
    before = torch.zeros(100, 200, dtype=torch.bool)
    for density in (0.0, 0.2, 0.5, 0.5001, 0.8, 1.0):
        mask = kept_mask(base, parent, density, 0.15)
        assert not bool((before & ~mask).any())
        before = mask


@pytest.mark.parametrize(("method", "plain"), [("della", "ties"), ("della_linear", "dare_linear")])
def test_density_one_is_the_plain_method_bit_for_bit(method, plain):
    base, parents = make_tensors(3, (50, 40))
    settings = {"density": (1.0,) * 3, "normalize": True}
    results = [
        run(METHODS[name], make_values(METHODS[name], 3, **settings), base, parents)
        for name in (method, plain)
    ]
    assert torch.equal(*results)


def test_survivors_have_the_l1_norm_of_the_task_vector():
    base = torch.zeros(50, 100)
    _, parents = make_tensors(1, (50, 100))
    alone = {"weight": (1.0,), "density": (0.4,), "lambda": 1.0}
    merged = run(LINEAR, make_values(LINEAR, 1, **alone), base, parents)
    norm = parents[0].double().abs().sum().item()
    assert merged.double().abs().sum().item() == pytest.approx(norm, rel=1e-6)


def test_ranks_that_are_not_kept_give_the_same_bits():
    base, parents = make_tensors(3, (50, 40))
    values = make_values(DELLA, 3)
    cache = StatisticsCache(keep_ranks=False)
    assert torch.equal(
        run(DELLA, values, base, parents, cache=cache), run(DELLA, values, base, parents)
    )
    names = ("a", "b", "c")
    flat = [parent.reshape(-1) for parent in parents]
    for keep, same in ((True, True), (False, False)):
        cache = StatisticsCache(keep_ranks=keep)
        facts = TensorStatistics("t", base.reshape(-1), flat, "base", names, 0, cache)
        assert (facts.ranks(0) is facts.ranks(0)) is same


@pytest.mark.parametrize(
    ("density", "epsilon", "wrong"),
    [
        (0.5, 0.15, False),
        (0.1, 0.15, True),
        (0.9, 0.15, True),
        (0.5, 0.5, True),
        (0.0, 0.15, False),
        (1.0, 0.15, False),
    ],
)
def test_chances_beyond_0_and_1_are_refused(density, epsilon, wrong):
    values = make_values(DELLA, 2, density=(0.5, density), epsilon=(0.1, epsilon))
    problem = DELLA.refuse(values)
    assert (problem is not None) is wrong
    if wrong:
        assert f"density {density} and epsilon {epsilon}" in problem


def test_everything_in_the_search_range_is_a_merge():
    ranges = {param.name: param.search for param in DELLA.params}
    for density in ranges["density"]:
        for epsilon in ranges["epsilon"]:
            values = make_values(DELLA, 1, density=(density,), epsilon=(epsilon,))
            assert DELLA.refuse(values) is None


def test_each_model_is_read_by_its_own_ranks():
    """All at once where every model has some, one by one where one has none."""
    base, parents = make_tensors(3, (8, 50), torch.bfloat16, seed=4)
    flat = [tensor.reshape(-1) for tensor in parents]
    facts = TensorStatistics(
        "tensor", base.reshape(-1), flat, "base", ("a", "b", "c"), shape=(8, 50)
    )
    own = [facts.ranks(model) for model in range(3)]
    assert len({tuple(rank_P.tolist()) for rank_P in own}) == 3
    every = DELLA.table(make_values(DELLA, 3, density=(0.5,) * 3, epsilon=(0.1,) * 3), facts)
    assert all(map(torch.equal, every.ranks, own))
    some = DELLA.table(make_values(DELLA, 3, density=(0.5, 1.0, 0.5), epsilon=(0.1,) * 3), facts)
    assert some.ranks[1] is None
    assert torch.equal(some.ranks[2], own[2])
