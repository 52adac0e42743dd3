"""A candidate that takes too long is a failed trial; the study goes on, and so does a resume."""

import pytest

from evomerge.config.search import make_search
from evomerge.errors import StudyError
from evomerge.study.run import run_search
from evomerge.study.view import load_study
from evomerge.workers.pool import InlinePool
from tests.world import make_world, settings

PARENT, CANDIDATE = 1, 6
"""Numbers of trials that take too long."""


class Clock:
    """Stands still, but while the runaway is scored."""

    def __init__(self):
        self.now_s, self.tick_s = 0.0, 0.0

    def __call__(self):
        self.now_s += self.tick_s
        return self.now_s


class SlowPool(InlinePool):
    """For which one candidate takes a minute for each forward pass."""

    def __init__(self, settings, runaway):
        self.clock, self.runaway = Clock(), runaway
        super().__init__(settings, self.clock)

    def submit(self, worker, job):
        self.clock.tick_s = 60.0 if job.trial == self.runaway else 0.0
        super().submit(worker, job)


def run(world, evaluations, time_limit, runaway=CANDIDATE, resume=False):
    """Run the study as far as so many evaluations; returns its records."""
    data = settings(world)
    data["study"]["budget"] = {"evaluations": evaluations}
    data["suite"]["time_limit"] = time_limit
    config = make_search(data)
    run_search(config, resume=resume, start_pool=lambda _, settings: SlowPool(settings, runaway))
    return load_study("study", storage=str(config.study.journal)).ledger.records


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_a_runaway_is_a_failed_trial_and_the_study_goes_on(world):
    records = run(world, 4, 150.0)
    states = [r.state for r in records]
    assert states[CANDIDATE] == "failed"
    assert set(states[:CANDIDATE] + states[CANDIDATE + 1 :]) <= {"done", "duplicate"}
    assert records[CANDIDATE].result.error.startswith(
        "search chunk 0: not done after 180.0 s, suite.time_limit allows 150 s."
    )
    resumed = run(world, 8, None, resume=True)  # the limit may change
    assert [r.state for r in resumed[: len(records)]] == states
    assert [r.state for r in resumed[len(records) :]] == ["done"] * 4


def test_parents_obey_the_limit(world):
    sentence = r"^baseline parent:a cannot be scored \(search chunk 0: .* suite\.time_limit allows"
    with pytest.raises(StudyError, match=sentence):
        run(world, 4, 150.0, runaway=PARENT)
