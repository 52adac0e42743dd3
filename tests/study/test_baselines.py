"""Greedy soup: its steps follow from recorded scores, and are taken once."""

from dataclasses import replace

import pytest

from evomerge.study.view import StudyView
from tests.study import fakes
from tests.study.fakes import FormulaPool, Killed, log_of, make_setup, run

BASELINES = ["base", *(f"parent:{name}" for name in "abcd"), "uniform"]
STEPS = ["greedy:1", "greedy:2", "greedy:3"]


@pytest.fixture
def four_parents(tmp_path, monkeypatch):
    """A search with parents a (0.8), b (0.5), and c and d that are equally bad (0.47)."""
    monkeypatch.setattr(
        fakes, "CONFIG", fakes.CONFIG.replace("b: /m/b", "b: /m/b, c: /m/c, d: /m/d")
    )

    def make(folder):
        setup = make_setup(tmp_path / folder, evaluations=2)
        return replace(setup, template=replace(setup.template, parents=setup.template.parents[:2]))

    return make


def names_of(recipe):
    return [str(source.model)[-1] for source in recipe.models]


def test_parents_stay_in_the_soup_unless_they_lower_its_score(four_parents):
    """With weight 1 in a mean: b spoils it (0.27), c makes it better (0.87), d changes nothing."""
    baselines = run(four_parents("s"), FormulaPool()).baselines
    assert list(baselines) == [*BASELINES, *STEPS, "greedy_soup", "mean:2"]
    tried = [names_of(baselines[step].recipe) for step in STEPS]
    assert tried == [["a", "b"], ["a", "c"], ["a", "c", "d"]]
    soup = baselines["greedy_soup"]
    assert (soup.state, soup.recipe) == ("duplicate", baselines["greedy:3"].recipe)
    assert soup.result.examples == 0
    best_parent = max(r.result.fitness for r in baselines.values() if r.is_parent)
    assert soup.result.fitness > best_parent


def test_steps_are_not_confirmed_but_the_soup_is(four_parents):
    setup, pool = four_parents("s"), FormulaPool()
    run(setup, pool)
    confirm = StudyView(setup.config).summary["confirm"]
    shortlist = [name for name in confirm if not name.startswith(("trial ", "mean", "winner"))]
    assert shortlist == [*BASELINES, "greedy_soup"]
    assert confirm["greedy_soup"]["objective"] == pytest.approx(0.87, abs=0.01)
    assert sum(role == "confirm" for _, role, _ in pool.jobs) == len(confirm) - 1


@pytest.mark.parametrize("crash_after", [1, 23, 24, 26, 28, 32, 35, 36, 38])
def test_a_killed_study_takes_the_same_steps(four_parents, crash_after):
    reference = log_of(run(four_parents("reference"), FormulaPool()))
    killed, resumed = FormulaPool(crash_after=crash_after), FormulaPool(seed=4)
    with pytest.raises(Killed):
        run(four_parents("s"), killed)
    assert log_of(run(four_parents("s"), resumed)) == reference
    assert not set(killed.jobs) & set(resumed.jobs), "no chunk that came back is scored again"


def test_of_two_parents_no_step_is_scored(tmp_path):
    baselines = run(make_setup(tmp_path), FormulaPool()).baselines
    assert "greedy:1" not in baselines  # it is the uniform mean
    assert baselines["greedy_soup"].recipe == baselines["parent:a"].recipe
