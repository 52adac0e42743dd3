import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

CONSENSUS = METHODS["consensus"]
DELTAS = [[1.0, 4.0, 0.1, 2.0], [1.0, 0.1, 0.1, -2.0], [1.0, 0.1, 3.0, 0.0]]


def merged(**settings):
    plain = {"weight": (1.0,) * 3, "lambda_mask": (0.5,) * 3, "lambda": 1.0}
    values = make_values(CONSENSUS, 3, **{**plain, **settings})
    parents = [torch.tensor(delta) for delta in DELTAS]
    return run(CONSENSUS, values, torch.zeros(4), parents).tolist()


def test_elements_that_too_few_tasks_need_are_left_at_the_base():
    # who needs what: all; only the first; only the third; the first two, and what is 0 needs 0
    assert merged(min_tasks=1) == pytest.approx([3.0, 4.2, 3.2, 0.0], rel=1e-6)
    assert merged(min_tasks=2) == [3.0, 0.0, 0.0, 0.0]
    assert merged(min_tasks=2, weight=(0.5, 1.0, 0.0)) == [1.5, 0.0, 0.0, -1.0]
    # the sum of the others is twice as large
    assert merged(min_tasks=1, lambda_mask=(0.51,) * 3)[0] == 0.0
    assert merged(min_tasks=2, lambda_mask=(0.51, 0.5, 0.5))[0] == 3.0


@pytest.mark.parametrize("min_tasks", [1, 3])
def test_masks_that_keep_all_make_it_task_arithmetic(min_tasks):
    base, parents = make_tensors(3, 5000)
    settings = {"lambda_mask": (0.0,) * 3, "min_tasks": min_tasks, "lambda": 1.0}
    out = run(CONSENSUS, make_values(CONSENSUS, 3, **settings), base, parents)
    plain = METHODS["task_arithmetic"]
    assert torch.equal(out, run(plain, make_values(plain, 3, **{"lambda": 1.0}), base, parents))


def test_more_tasks_than_models_are_refused():
    assert "3 models" in CONSENSUS.refuse(make_values(CONSENSUS, 3, min_tasks=4))
    assert CONSENSUS.refuse(make_values(CONSENSUS, 3, min_tasks=3)) is None
