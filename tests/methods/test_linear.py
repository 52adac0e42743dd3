import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

LINEAR = METHODS["linear"]


@pytest.mark.parametrize("weights", [(0.5, -0.5), (0.1, 0.2, -0.3), (0.0,)])
def test_weights_that_add_up_to_nothing_are_refused(weights):
    assert "add up to 0" in LINEAR.refuse(make_values(LINEAR, 3, weight=weights))
    assert LINEAR.refuse(make_values(LINEAR, 3, weight=weights, normalize=False)) is None
    assert LINEAR.refuse(make_values(LINEAR, 4, weight=(*weights, 0.1))) is None


def test_only_the_proportions_of_the_weights_count():
    base, parents = make_tensors(3, 100)
    one = run(LINEAR, make_values(LINEAR, 3, weight=(2.0, 1.0, 1.0)), base, parents)
    other = run(LINEAR, make_values(LINEAR, 3, weight=(0.5, 0.25, 0.25)), base, parents)
    assert torch.equal(one, other)
    plain = make_values(LINEAR, 3, weight=(2.0, 1.0, 1.0), normalize=False)
    assert torch.equal(run(LINEAR, plain, base, parents), one * 4)
