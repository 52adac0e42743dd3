"""Tiny tasks on disk, shared by the tests of this room."""

import pytest

from tests.tiny import make_tokenizer, write_tasks


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()
