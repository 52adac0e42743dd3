"""Every row of the table of merge methods, run through the contract."""

import pytest

from evomerge.methods import METHODS
from tests.contracts.merge_method import MergeMethodContract, without_base
from tests.contracts.textbook import TEXTBOOK

CASES = {
    **METHODS,
    **{
        f"{name} without base": without_base(method)
        for name, method in METHODS.items()
        if method.base == "optional"
    },
}


class TestMethods(MergeMethodContract):
    @pytest.fixture(params=CASES)
    def method(self, request):
        return CASES[request.param]


def test_every_method_has_its_textbook():
    assert set(TEXTBOOK) == set(METHODS)
