"""Every row of the table of merge methods, run through the contract."""

import pytest

from evomerge.methods import METHODS
from tests.contracts.merge_method import MergeMethodContract
from tests.contracts.textbook import TEXTBOOK


class TestMethods(MergeMethodContract):
    @pytest.fixture(params=METHODS)
    def method(self, request):
        return METHODS[request.param]


def test_every_method_has_its_textbook():
    assert set(TEXTBOOK) == set(METHODS)
