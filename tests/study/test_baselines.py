"""Greedy soup: its steps follow from recorded scores, and are taken once."""

from dataclasses import replace

import pytest

from evomerge.study.view import StudyView
from tests.study import fakes
from tests.study.fakes import ALL, FEW, FormulaPool, Killed, log_of, make_setup, run

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


SWEEP = ["lambda:0.2", "lambda:0.4", "lambda:0.6", "lambda:0.8", "lambda:1"]


def test_the_best_of_the_sweep_counts(tmp_path):
    """With the top at weights 0.7 and 0.2, equal weights are best at 0.45: of the steps, at 0.4."""
    setup = make_setup(tmp_path, baselines=ALL)
    baselines = run(setup, FormulaPool()).baselines
    asked = ["base", "parent:a", "parent:b", "uniform", *SWEEP, "ties", "model_stock"]
    assert list(baselines) == [*asked, "greedy_soup", "lambda_sweep", "mean:12"]
    assert baselines["lambda_sweep"].recipe == baselines["lambda:0.4"].recipe
    assert baselines["lambda_sweep"].result.examples == 0
    weights = [s.parameters["weight"] for s in baselines["lambda:0.4"].recipe.models]
    assert weights == [0.4, 0.4]
    methods = [baselines[n].recipe.merge_method for n in ("lambda:0.4", "ties", "model_stock")]
    assert methods == ["task_arithmetic", "ties", "model_stock"]
    confirm = StudyView(setup.config).summary["confirm"]
    assert not [name for name in confirm if name.startswith("lambda:")], "steps are not confirmed"
    assert "lambda_sweep" in confirm


def test_a_search_that_does_not_beat_its_baselines_says_so(tmp_path, monkeypatch):
    ordinary = make_setup(tmp_path / "a", baselines=ALL, evaluations=24)
    run(ordinary, FormulaPool())
    assert StudyView(ordinary.config).summary["not_beaten"] is None
    monkeypatch.setattr(fakes, "OPTIMUM", {"a": 0.4, "b": 0.4})  # where the sweep has a step
    beaten = make_setup(tmp_path / "b", baselines=ALL, evaluations=4)
    run(beaten, FormulaPool())
    sentence = StudyView(beaten.config).summary["not_beaten"]
    assert sentence.startswith("The search does not beat its baselines: on the confirm items")
    assert "lambda_sweep has 1.00" in sentence


def test_random_search_has_as_many_items_and_its_best_counts(tmp_path):
    setup = make_setup(tmp_path, baselines=(*FEW, "random_search"))
    ledger = run(setup, FormulaPool())
    tried = {n: r for n, r in ledger.baselines.items() if n.startswith("random:")}
    assert list(tried) == [f"random:{i}" for i in range(12)]
    spent = sum(record.result.examples for record in tried.values())
    assert spent == ledger.num_examples_of_candidates == 12 * 40
    best = max(tried.values(), key=lambda record: record.result.fitness)
    summary = StudyView(setup.config).summary
    assert summary["baselines"]["random_search"]["trial"] == best.number
    assert summary["confirm"]["random_search"]["trial"] == best.number
    points = [[s.parameters["weight"] for s in record.recipe.models] for record in tried.values()]
    flat = [weight for point in points for weight in point]
    assert len(set(flat)) == 24
    # of 24 draws from 0 to 1 the mean is 0.5, give or take three standard errors of 0.06
    assert 0.32 < sum(flat) / 24 < 0.68
    again = run(make_setup(tmp_path / "again", baselines=(*FEW, "random_search")), FormulaPool())
    assert [again.baselines[name].recipe for name in tried] == [r.recipe for r in tried.values()]


def test_a_race_leaves_random_search_fewer_candidates(tmp_path):
    changes = "racing: {mode: aggressive}\n"
    setup = make_setup(tmp_path, baselines=(*FEW, "random_search"), changes=changes)
    ledger = run(setup, FormulaPool())
    spent = ledger.num_examples_of_candidates
    assert spent < 12 * 40
    assert sum(name.startswith("random:") for name in ledger.baselines) == -(-spent // 40)


@pytest.mark.parametrize("crash_after", [16, 30, 47, 60, 100, 120, 150])
def test_a_killed_study_scores_the_same_baselines(tmp_path, crash_after):
    every = (*ALL, "random_search")
    reference = log_of(run(make_setup(tmp_path / "reference", baselines=every), FormulaPool()))
    killed, resumed = FormulaPool(crash_after=crash_after), FormulaPool(seed=4)
    with pytest.raises(Killed):
        run(make_setup(tmp_path / "s", baselines=every), killed)
    assert log_of(run(make_setup(tmp_path / "s", baselines=every), resumed)) == reference
    assert not set(killed.jobs) & set(resumed.jobs), "no chunk that came back is scored again"


def test_what_is_no_merge_of_the_models_is_left_out_with_its_reason(tmp_path):
    setup = make_setup(tmp_path, baselines=ALL)
    setup = replace(setup, unfit_baselines={"model_stock": "model_stock takes 2 or more models."})
    assert "model_stock" not in run(setup, FormulaPool()).baselines
