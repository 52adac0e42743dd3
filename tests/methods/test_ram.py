import pytest
import torch

from evomerge.methods import METHODS
from tests.contracts.merge_method import make_tensors, make_values, run

RAM, PLUS = METHODS["ram"], METHODS["ramplus_tl"]
DELTAS = [[1.0, 2.0, 0.0, 0.05], [0.0, 4.0, 0.0, 0.0], [0.0, 0.1, 0.0, -3.0]]


def merged(method, **settings):
    parents = [torch.tensor(delta) for delta in DELTAS]
    values = make_values(method, 3, **settings)
    return run(method, values, torch.zeros(4), parents).tolist()


def test_shared_elements_are_averaged_and_others_added_whole():
    assert merged(RAM, epsilon=0.1) == [1.0, 3.0, 0.0, -3.0]
    assert merged(RAM, epsilon=0.01) == pytest.approx([1.0, 6.1 / 3, 0.0, -2.95 / 2], rel=1e-6)
    assert merged(RAM, epsilon=5.0) == [0.0] * 4


def test_what_only_one_model_has_grows_with_what_it_shares():
    # the first model shares one element and has one alone, the third only one alone
    settings = {"epsilon": 0.1, "r": 0.5}
    assert merged(PLUS, **settings, alpha=2.0) == [1.5, 3.0, 0.0, -3.0]
    assert merged(PLUS, **settings, alpha=0.5) == [1.25, 3.0, 0.0, -3.0]


def test_without_r_or_alpha_it_is_ram_bit_for_bit():
    base, parents = make_tensors(3, 5000)
    plain = run(RAM, make_values(RAM, 3), base, parents)
    for name in ("r", "alpha"):
        assert torch.equal(run(PLUS, make_values(PLUS, 3, **{name: 0.0}), base, parents), plain)


def test_one_model_is_the_merge_but_for_its_small_elements():
    base, parents = make_tensors(1, 5000)
    out = run(RAM, make_values(RAM, 1, epsilon=0.0), base, parents)
    assert torch.allclose(out, parents[0], rtol=0, atol=2.0**-24)
