"""From config and space to a proposer."""

import subprocess
import sys

import pytest

from evomerge.config.proposer import ProposerConfig
from evomerge.propose import make_proposer
from tests.space.models import make_space


def test_space_and_config_decide():
    space = make_space("  weight: {search: [0.0, 2.0], sigma: 0.3}\n  lambda: {initial: 0.75}")
    proposer = make_proposer(ProposerConfig(sigma=0.05, population=6), space, seed=2**40 + 1)
    assert proposer.spec() == {
        "name": "CMA",
        "population": 6,
        "options": {},
        "start": [0.25, 0.25, 0.25],
        "step": [0.3, 0.3, 0.05],
        "seed": 2**40 + 1,
    }
    assert (proposer.size, proposer.generation) == (3, 6)
    assert proposer.mean() == pytest.approx(space.initial)
    assert proposer.ask().shape == (3,)


def test_the_room_is_imported_without_nevergrad():
    code = "import evomerge.propose, sys; assert not {'nevergrad', 'cma'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
