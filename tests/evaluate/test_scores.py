"""Objectives against formulas written out by hand, and what they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.objective import ObjectiveConfig
from evomerge.config.strict import Origin, validate
from evomerge.errors import ConfigError, EvaluationError, NonFiniteError
from evomerge.evaluate.evaluator import TaskMetric
from evomerge.evaluate.scores import ScoredTask, make_objective

MATHS = ScoredTask("maths", "exact_match,strict", weight=3.0)
READING = ScoredTask("reading", "acc,none", weight=1.0, floor=0.25)
WATCHED = ScoredTask("watched", "acc,none", weight=0.0)
TEXT = ScoredTask("text", "bits_per_byte,none", weight=1.0, higher_is_better=False)
UNIT = st.floats(0, 1)


def objective(*tasks, **config):
    return make_objective(ObjectiveConfig(**config), tasks or (MATHS, READING, WATCHED))


def metrics(maths=0.4, reading=0.5, watched=0.9, text=1.5, stderr=0.1):
    return {
        "maths": {
            "exact_match,strict": TaskMetric(maths, stderr, 20),
            "exact_match,flexible": TaskMetric(0.99, 0.1, 20),
        },
        "reading": {"acc,none": TaskMetric(reading, 0.2, 20)},
        "watched": {"acc,none": TaskMetric(watched, 0.2, 20)},
        "text": {"bits_per_byte,none": TaskMetric(text, None, 20)},
    }


def test_weighted_mean_and_its_error():
    score = objective()(metrics())
    assert score.value == pytest.approx((3 * 0.4 + 0.5) / 4, rel=1e-15)
    assert score.stderr == pytest.approx(math.hypot(0.75 * 0.1, 0.25 * 0.2), rel=1e-15)


def test_error_of_the_mean_is_the_spread_over_redrawn_items():
    # two tasks of 50 items each with known spread: the spread of the objective over many draws is
    # its standard error
    rng = np.random.default_rng(0)
    maths = rng.random((4000, 50)) < 0.4
    reading = rng.random((4000, 50)) < 0.5
    scores = [
        objective()(metrics(*(float(draw.mean()) for draw in pair))).value
        for pair in zip(maths, reading, strict=True)
    ]
    expected = math.hypot(0.75 * math.sqrt(0.24 / 50), 0.25 * math.sqrt(0.25 / 50))
    # the spread of 4000 draws is known to 1/sqrt(2 * 4000) = 1.1 %; five times that
    assert np.std(scores) == pytest.approx(expected, rel=0.06)


def test_worst_task_and_geometric_mean():
    assert objective(kind="worst_task")(metrics()).value == 0.4
    score = objective(kind="geometric_mean")(metrics())
    assert score.value == pytest.approx((0.4**3 * 0.5) ** 0.25, rel=1e-15)
    assert score.stderr is None
    assert objective(kind="geometric_mean")(metrics(maths=0.0)).value == 0.0


def test_floor_normalised():
    score = objective(scores="floor_normalised")(metrics())
    assert score.value == pytest.approx((3 * 0.4 + (0.5 - 0.25) / 0.75) / 4, rel=1e-15)
    assert score.stderr == pytest.approx(math.hypot(0.75 * 0.1, 0.25 * 0.2 / 0.75), rel=1e-15)
    below = objective(scores="floor_normalised", kind="worst_task")(metrics(reading=0.1))
    assert below.value == pytest.approx(-0.2, rel=1e-15)
    # no better than a guess has no geometric mean but 0
    geometric = objective(scores="floor_normalised", kind="geometric_mean")
    assert geometric(metrics(reading=0.1)).value == 0.0


def test_parent_relative():
    relative = objective(scores="parent_relative").with_parents(
        [metrics(maths=0.2, reading=0.8), metrics(maths=0.5, reading=0.1)]
    )
    score = relative(metrics())
    assert score.value == pytest.approx((3 * 0.4 / 0.5 + 0.5 / 0.8) / 4, rel=1e-15)
    assert score.stderr == pytest.approx(math.hypot(0.75 * 0.1 / 0.5, 0.25 * 0.2 / 0.8), rel=1e-15)
    assert relative(metrics(maths=0.5, reading=0.8)).value == pytest.approx(1.0, rel=1e-15)


def test_lower_is_better_is_negated():
    score = objective(TEXT, READING)(metrics())
    assert score.value == pytest.approx((-1.5 + 0.5) / 2, rel=1e-15)
    assert score.stderr is None
    assert objective(TEXT)(metrics(text=1.0)).value > objective(TEXT)(metrics(text=2.0)).value


@pytest.mark.parametrize("scores", ["raw", "floor_normalised", "parent_relative"])
@pytest.mark.parametrize("kind", ["weighted_mean", "worst_task", "geometric_mean"])
@given(a=UNIT, b=UNIT, c=UNIT)
def test_better_on_a_task_is_never_worse(kind, scores, a, b, c):
    scored = objective(kind=kind, scores=scores).with_parents([metrics(maths=0.5, reading=0.5)])
    low, high = sorted((a, b))
    worse, better = scored(metrics(low, c)).value, scored(metrics(high, c)).value
    # the same sum in another order of roundings: a few units in the last place of numbers of size 4
    assert better >= worse - 4e-15


def refused(error, message, *tasks, **config):
    with pytest.raises(error, match=message):
        objective(*tasks, **config)(metrics())


def test_what_makes_no_sense_is_refused():
    what = "lower bits_per_byte,none is better on task 'text'"
    refused(
        ConfigError,
        f"objective.scores: {what}; floor_normalised needs",
        TEXT,
        scores="floor_normalised",
    )
    refused(
        ConfigError,
        f"objective.scores: {what}; parent_relative needs",
        TEXT,
        scores="parent_relative",
    )
    refused(
        ConfigError, f"objective.kind: {what}, so its scores are neg", TEXT, kind="geometric_mean"
    )
    guess = ScoredTask("reading", "acc,none", floor=1.0)
    refused(ConfigError, "task 'reading' has floor 1; floor_norm", guess, scores="floor_normalised")
    missing = ScoredTask("maths", "acc,none")
    refused(EvaluationError, "task 'maths': no acc,none was measured", missing)
    with pytest.raises(ConfigError) as both:
        objective(TEXT, guess, scores="floor_normalised")
    assert len(str(both.value).splitlines()) == 2


def test_scores_without_a_value_are_refused():
    with pytest.raises(NonFiniteError, match="task 'maths': exact_match,strict is nan"):
        objective()(metrics(maths=math.nan))
    with pytest.raises(
        EvaluationError, match=r"task 'maths' has exact_match,strict -0\.1; a geometric"
    ):
        objective(kind="geometric_mean")(metrics(maths=-0.1))
    with pytest.raises(EvaluationError, match="the best parent has 0 on task 'reading'"):
        objective(scores="parent_relative").with_parents([metrics(reading=0.0)])
    with pytest.raises(EvaluationError, match="the best parent has 0 on task 'maths'"):
        objective(scores="parent_relative").with_parents([])
    assert objective().with_parents([]) == objective()  # raw scores need no parents


def test_a_task_that_does_not_count_may_be_anything():
    assert objective()(metrics(watched=math.nan)).value == objective()(metrics()).value
    watched = ScoredTask("watched", "acc,none", weight=0.0, higher_is_better=False)
    assert objective(READING, watched, kind="geometric_mean")(metrics()).value == 0.5


def test_unknown_kinds_are_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"kind: came 'mean', allowed: .*'worst_task'"):
        validate(ObjectiveConfig, {"kind": "mean"}, Origin("a.yaml"))
