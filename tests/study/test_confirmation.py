"""Confirmation in a study: who is scored on unused items, who wins there, and the one test."""

import dataclasses
import random

import pytest

from evomerge.errors import StudyError
from evomerge.study.confirmation import used_items
from evomerge.study.view import StudyView
from tests.study import fakes
from tests.study.fakes import FormulaPool, Killed, log_of, make_setup, run

REPORT = 60
landscape = fakes.score_of


def setup_of(folder, **kwargs):
    return make_setup(folder, **{"report": REPORT, **kwargs})


def summary_of(setup):
    return StudyView(setup.config).summary


def items_of(setup, role, turn):
    setup = dataclasses.replace(setup, tasks=dataclasses.replace(setup.tasks, turn=turn))
    return {item for chunk in setup.tasks.chunks(role) for item in chunk.items["t"]}


def test_the_winner_of_the_confirm_items_is_tested_once_against_the_best_parent(tmp_path):
    setup, pool = setup_of(tmp_path), FormulaPool()
    ledger = run(setup, pool)
    summary = summary_of(setup)
    scores = {n: s for n, s in summary["confirm"].items() if n != "winner"}
    winner, verdict = summary["confirm"]["winner"], summary["verdict"]
    merges = {n: s["objective"] for n, s in scores.items() if not n.startswith(("base", "parent"))}
    assert winner["objective"] == max(merges.values())
    assert verdict["parent"] == "parent a"
    reported = {trial for trial, role, _ in pool.jobs if role == "report"}
    assert reported == {winner["trial"], 1}, "nobody else sees the report items"
    # all items differ by the same, which is the difference of the two landscapes
    gap = landscape(ledger[winner["trial"]].recipe, 0) - landscape(ledger[1].recipe, 0)
    assert verdict["effect"] == pytest.approx(gap, abs=1e-12)
    assert (verdict["outcome"], verdict["num_items"]) == ("better", REPORT)
    assert summary["no_verdict"] is None


def test_a_merge_that_is_lucky_on_search_items_is_not_the_winner(tmp_path, monkeypatch):
    """Trial 9 gains 2 on search items alone: it leads the search and loses the confirmation."""
    lucky = run(setup_of(tmp_path / "plain"), FormulaPool())[9].recipe.hash

    def score_of(recipe, item):
        return landscape(recipe, item) + 2.0 * (recipe.hash == lucky and item < 1000)

    monkeypatch.setattr(fakes, "score_of", score_of)
    setup = setup_of(tmp_path / "lucky")
    ledger = run(setup, FormulaPool())
    assert ledger.best.number == 9
    confirm = summary_of(setup)["confirm"]
    assert "trial 9" in confirm
    assert confirm["winner"]["trial"] != 9
    best = max(s["objective"] for n, s in confirm.items() if n.startswith(("trial", "mean")))
    assert confirm["winner"]["objective"] == best


def test_no_merge_is_better_where_none_is(tmp_path, monkeypatch):
    """Parent a is at the top; every merge is equal to it in truth, with luck per item."""

    monkeypatch.setattr(fakes, "score_of", lambda recipe, item: _coin(recipe.hash, item))
    setup = setup_of(tmp_path)
    ledger = run(setup, FormulaPool())
    summary = summary_of(setup)
    assert ledger.best.result.fitness > 0.55, "the search believes that it found something"
    assert summary["verdict"]["outcome"] == "no_evidence"
    assert "no evidence that any merge is better than" in summary["verdict"]["sentence"]
    assert summary["verdict"]["optimism"] > 0


def _coin(name, item):
    return float(random.Random(f"{name}{item}").random() < 0.5)


def test_the_base_may_be_the_best_parent(tmp_path, monkeypatch):
    """One published optimum is the unmerged base."""
    monkeypatch.setattr(
        fakes, "score_of", lambda recipe, item: 1.0 - sum(w**2 for w in weights_of(recipe))
    )
    setup = setup_of(tmp_path)
    run(setup, FormulaPool())
    verdict = summary_of(setup)["verdict"]
    assert verdict["parent"] == "the base model"
    assert verdict["outcome"] == "no_evidence"
    assert verdict["effect"] < 0


def weights_of(recipe):
    names = {str(source.model): source.parameters.get("weight", 1.0) for source in recipe.models}
    return [weight for model, weight in names.items() if not model.endswith("base")]


def test_without_report_items_there_is_a_winner_and_no_verdict(tmp_path):
    setup = setup_of(tmp_path, report=0)
    run(setup, FormulaPool())
    summary = summary_of(setup)
    assert summary["confirm"]["winner"]["name"].startswith(("trial", "mean"))
    assert summary["verdict"] is None
    assert summary["no_verdict"] == (
        "no verdict: there are no report items to test on. Give suite.items.report a count and run "
        "evomerge confirm."
    )


def test_each_confirmation_has_items_of_its_own(tmp_path):
    setup, pool = setup_of(tmp_path), FormulaPool()
    run(setup, pool)
    first = summary_of(setup)["verdict"]
    again = FormulaPool()
    confirmation = run(setup, again, confirm=True)
    for role in ("confirm", "report"):
        seen = {trial for trial, r, _ in again.jobs if r == role}
        assert seen, "everyone is scored anew"
        items = [items_of(setup, role, turn) for turn in (1, 2)]
        assert not items[0] & items[1]
        assert set(confirmation.used["t"]["test"]) >= items[1]
        assert not set(confirmation.used["t"]["test"]) & items[0]
    assert not [job for job in again.jobs if job[1] == "search"]
    summary = summary_of(setup)
    assert summary["confirmations"] == 2
    assert summary["verdict"]["effect"] == confirmation.verdict.effect
    assert first["num_items"] == summary["verdict"]["num_items"]


def test_a_study_that_went_on_says_that_its_confirmation_is_of_before(tmp_path):
    setup = setup_of(tmp_path, evaluations=8)
    run(setup, FormulaPool())
    assert summary_of(setup)["outdated"] is None
    larger = setup_of(tmp_path, evaluations=16)
    with pytest.raises(Killed):
        run(larger, FormulaPool(crash_after=20))
    assert summary_of(larger)["outdated"] is not None
    run(larger, FormulaPool())
    assert summary_of(larger)["outdated"] is None
    assert summary_of(larger)["confirmations"] == 2


def test_no_items_left_is_one_sentence(tmp_path, monkeypatch):
    setup = setup_of(tmp_path)
    run(setup, FormulaPool())
    monkeypatch.setattr(fakes.FormulaTasks, "chunks", _without_unseen(fakes.FormulaTasks.chunks))
    with pytest.raises(StudyError, match=r"no confirm items are left that were not used. Give"):
        run(setup, FormulaPool(), confirm=True)


def _without_unseen(chunks):
    return lambda self, role: () if role != "search" else chunks(self, role)


def test_nothing_to_confirm_is_one_sentence(tmp_path):
    setup = setup_of(tmp_path)
    with pytest.raises(Killed):
        run(setup, FormulaPool(crash_after=5))
    with pytest.raises(StudyError, match=r"no candidate has been scored yet. Resume it first."):
        run(setup, FormulaPool(), confirm=True)


def test_what_watches_sees_the_search_then_the_confirmation_then_the_end(tmp_path):
    states = []
    run(setup_of(tmp_path), FormulaPool(), observe=lambda summary: states.append(summary["state"]))
    assert list(dict.fromkeys(states)) == ["running", "confirming", "done"]
    assert states == sorted(states, key=["running", "confirming", "done"].index)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    setup, pool = setup_of(tmp_path_factory.mktemp("reference")), FormulaPool()
    ledger = run(setup, pool)
    num_before = sum(role == "search" for _, role, _ in pool.jobs)
    return log_of(ledger), summary_of(setup), num_before, len(pool.jobs)


@pytest.mark.parametrize("where", [-3, 0, 1, 5, 8, 11, -1])
def test_a_killed_confirmation_goes_on_on_the_same_items(tmp_path, reference, where):
    """Killed while the mean, the shortlist or the last two are scored: as if nothing had been."""
    log, summary, num_search, num_all = reference
    crash_after = num_all - 2 if where == -1 else num_search + where
    killed, resumed = FormulaPool(crash_after=crash_after), FormulaPool(seed=7)
    setup = setup_of(tmp_path)
    with pytest.raises(Killed):
        run(setup, killed)
    assert log_of(run(setup, resumed)) == log
    for field in ("confirm", "verdict", "no_verdict", "confirmations"):
        assert summary_of(setup)[field] == summary[field]
    assert not set(killed.jobs) & set(resumed.jobs)


@pytest.mark.parametrize("workers", [1, 7])
def test_neither_workers_nor_timing_change_a_confirmation(tmp_path, reference, workers):
    setup = setup_of(tmp_path, workers=workers)
    run(setup, FormulaPool(num_workers=workers, seed=4))
    assert summary_of(setup)["confirm"] == reference[1]["confirm"]
    assert summary_of(setup)["verdict"] == reference[1]["verdict"]


def test_the_mean_is_scored_on_search_items_too_and_confirmed(tmp_path):
    setup = setup_of(tmp_path)
    ledger = run(setup, FormulaPool())
    mean = ledger.baselines["mean:12"]
    proposer = setup.proposer()
    for record in ledger.candidates:
        proposer.ask()
        if record.ask.seq % 4 == 3:
            for told in ledger.candidates[record.ask.seq - 3 : record.ask.seq + 1]:
                proposer.tell(told.ask.seq, told.result.told_loss)
    expected = dict(zip(("weight.a", "weight.b"), map(float, proposer.mean()), strict=True))
    found = {f"weight.{str(s.model)[-1]}": s.parameters["weight"] for s in mean.recipe.models}
    assert found == pytest.approx(expected, abs=1e-6), "decoded to the grid of 1e-6"
    assert mean.result.examples == 40
    assert summary_of(setup)["confirm"]["mean"]["trial"] == mean.number


def test_whom_to_confirm_is_a_setting(tmp_path):
    setup = setup_of(tmp_path, changes="confirm: {best: 2, mean: false}\n")
    ledger = run(setup, FormulaPool())
    names = [n for n in summary_of(setup)["confirm"] if n.startswith(("trial", "mean"))]
    assert names == [f"trial {record.number}" for record in ledger.ranked()[:2]]
    assert not [name for name in ledger.baselines if name.startswith("mean")]


def test_a_candidate_that_fails_on_confirm_items_is_dropped_and_a_parent_is_not(tmp_path):
    setup = setup_of(tmp_path)
    best = run(setup_of(tmp_path / "plain"), FormulaPool()).best.number

    def fails(trial):
        return lambda job: "failed" if (job.trial, job.chunk.role) == (trial, "confirm") else None

    run(setup, FormulaPool(fault=fails(best)))
    summary = summary_of(setup)
    assert f"trial {best}" not in summary["confirm"]
    assert summary["verdict"]["winner"] != f"trial {best}"
    with pytest.raises(StudyError, match=r"trial 2 \(parent:b\) cannot be scored on the confirm"):
        run(setup_of(tmp_path / "parent"), FormulaPool(fault=fails(2)))


def test_what_fails_on_report_items_leaves_no_verdict_with_its_reason(tmp_path):
    def fault(job):
        return "failed" if job.chunk.role == "report" else None

    setup = setup_of(tmp_path)
    run(setup, FormulaPool(fault=fault))
    summary = summary_of(setup)
    assert summary["verdict"] is None
    assert summary["no_verdict"] == "no verdict: injected failed"


def test_used_items_are_those_of_all_confirmations(tmp_path):
    setup = setup_of(tmp_path)
    run(setup, FormulaPool())
    both = (*StudyView(setup.config).confirmations, run(setup, FormulaPool(), confirm=True))
    every = {
        i for turn in (1, 2) for role in ("confirm", "report") for i in items_of(setup, role, turn)
    }
    assert set(used_items(both)["t"]["test"]) == every
