"""What every proposer promises. A test class inherits this and gives the fixture `make`."""

import json
import math
import random

import numpy as np
import pytest

from evomerge.errors import StudyError
from evomerge.propose.proposer import replay

GENERATION = 8
"""Candidates of a generation in these tests; `make` uses it too."""


def sphere(vector):
    return float(np.sum((vector - 0.3) ** 2))


def drive(proposer, num_asks, loss=sphere, in_flight=GENERATION, order=0):
    """Ask and tell with candidates in flight that come back in shuffled order; returns the log.

    The log ends with candidates that were asked for and not told.
    """
    shuffle = random.Random(order)
    asks, tells, open_ids = [], [], []
    while len(asks) < num_asks:
        while len(open_ids) < in_flight and len(asks) < num_asks:
            open_ids.append(len(asks))
            asks.append((len(tells), tuple(proposer.ask().tolist())))
        for _ in range(shuffle.randint(1, in_flight)):
            if len(asks) < num_asks:
                known = open_ids.pop(shuffle.randrange(len(open_ids)))
                tells.append((known, loss(np.array(asks[known][1]))))
                proposer.tell(*tells[-1])
            if not open_ids:
                break
    return asks, tells


class ProposerContract:
    """`make(size, seed)` returns a fresh proposer that starts at 0.4 with steps of 0.1."""

    @pytest.fixture
    def make(self):
        raise AssertionError("the test class gives make")

    @pytest.mark.parametrize("size", [1, 5])
    def test_asks_are_vectors_in_the_cube(self, make, size):
        asks, _ = drive(make(size, seed=0), 80)
        vectors = np.array([vector for _, vector in asks])
        assert vectors.shape == (80, size)
        assert vectors.min() >= 0.0
        assert vectors.max() <= 1.0
        assert len(np.unique(vectors, axis=0)) > 20  # it does search

    def test_the_seed_and_the_log_decide(self, make):
        log = drive(make(3, seed=5), 60)
        np.random.seed(99)  # noqa: NPY002 - the global state must not matter
        random.seed(99)
        assert drive(make(3, seed=5), 60) == log
        assert drive(make(3, seed=6), 60)[0] != log[0]

    @pytest.mark.parametrize("cut", [3, 45])
    def test_replay_goes_on_where_the_log_stops(self, make, cut):
        original, fresh = make(4, seed=2), make(4, seed=2)
        asks, tells = drive(original, cut)
        assert len(tells) < len(asks), "the cut must lie within a generation"
        replay(fresh, asks, tells)
        assert (fresh.num_asks, fresh.num_tells) == (len(asks), len(tells))
        told = {known for known, _ in tells}
        for proposer in (original, fresh):
            for known in sorted({*range(cut)} - told, reverse=True):
                proposer.tell(known, sphere(np.array(asks[known][1])))
        ahead = [[proposer.ask().tolist() for _ in range(20)] for proposer in (original, fresh)]
        assert ahead[0] == ahead[1]

    def test_replay_refuses_another_log(self, make):
        asks, tells = drive(make(3, seed=0), 20)
        vector = list(asks[12][1])
        vector[1] = vector[1] + 2e-6 if vector[1] < 0.5 else vector[1] - 2e-6
        asks[12] = (asks[12][0], tuple(vector))
        with pytest.raises(StudyError, match=r"^ask 12: .* knob 1, .*install the versions"):
            replay(make(3, seed=0), asks, tells)
        vector[1] = asks[12][1][1]
        with pytest.raises(StudyError, match=r"^ask 0: the log has 3 knobs, the proposer 2"):
            replay(make(2, seed=0), asks, tells)

    def test_replay_forgives_what_other_processors_change(self, make):
        asks, tells = drive(make(3, seed=0), 20)
        blurred = [(after, tuple(abs(u - 5e-7) for u in vector)) for after, vector in asks]
        replay(make(3, seed=0), blurred, tells)

    def test_what_a_tell_may_not_be(self, make):
        proposer = make(2, seed=0)
        proposer.ask()
        for known, loss in ((0, math.nan), (0, math.inf), (0, -math.inf), (1, 0.0), (-1, 0.0)):
            with pytest.raises(AssertionError):
                proposer.tell(known, loss)
        proposer.tell(0, 0.5)
        with pytest.raises(AssertionError, match="told before"):
            proposer.tell(0, 0.5)
        assert (proposer.num_asks, proposer.num_tells) == (1, 1)

    def test_late_tells_and_one_at_a_time(self, make):
        for in_flight in (1, 3 * GENERATION):
            asks, tells = drive(make(3, seed=1), 70, in_flight=in_flight)
            assert len(tells) > 40
            assert len({vector for _, vector in asks}) > 20

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # TBPSA divides 0 by 0
    def test_equal_scores_do_not_end_the_search(self, make):
        asks, _ = drive(make(3, seed=3), 16 * GENERATION, loss=lambda vector: 0.25)
        last = np.array([vector for _, vector in asks[-GENERATION:]])
        assert np.unique(last, axis=0).shape[0] > 1

    def test_the_specification_is_plain_data(self, make):
        spec = make(3, seed=4).spec()
        assert json.loads(json.dumps(spec)) == spec
        assert make(3, seed=4).spec() == spec
        assert make(3, seed=5).spec() != spec
        assert make(2, seed=4).spec() != spec
