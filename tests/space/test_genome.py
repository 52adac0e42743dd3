"""Genomes are values: equal by their numbers, exact through JSON."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.space.genome import Genome
from tests.space.models import PROPERTY

points = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5)


@PROPERTY
@given(points)
def test_json_keeps_every_bit(units):
    genome = Genome(tuple(units))
    back = Genome(tuple(json.loads(json.dumps(list(genome.units)))))
    assert back == genome
    assert hash(back) == hash(genome)
    assert [u.hex() for u in back.units] == [u.hex() for u in genome.units]


def test_genomes_are_equal_by_their_numbers():
    assert Genome((0.25, 1.0)) == Genome((0.25, 1.0))
    assert Genome((0.25, 1.0)) != Genome((0.25, 1.0 - 2**-53))
    assert len({Genome((0.25,)), Genome((0.25,)), Genome((0.5,))}) == 2


def test_distance():
    assert Genome((0.0, 0.25)).distance(Genome((0.5, 1.0))) == math.hypot(0.5, 0.75)


@pytest.mark.parametrize("unit", [-1e-9, 1.0 + 1e-9, math.nan])
def test_nothing_outside_the_cube(unit):
    with pytest.raises(AssertionError):
        Genome((0.5, unit))
