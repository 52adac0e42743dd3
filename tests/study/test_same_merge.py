"""The same merge is scored once: later trials of it are told what the first one scored."""

import dataclasses
import json
import shutil

import pytest
import yaml
from click.testing import CliRunner

import evomerge
from evomerge.cli.check import check
from evomerge.cli.search import search
from evomerge.config.search import make_search
from evomerge.errors import InterruptedStudy
from evomerge.study.ledger import Ledger
from evomerge.study.records import TrialResult
from evomerge.study.run import run_search
from evomerge.study.view import StudyView
from tests.study.fakes import FormulaPool, Killed, log_of, make_setup, run
from tests.world import make_world, settings


def coarse(recipe):
    """Stands for the canonical hash: weights are told apart to a tenth; the base is `a`."""
    weights = [(str(s.model), round(10 * s.parameters.get("weight", 1.0))) for s in recipe.models]
    return str([(model.replace("base", "a"), w) for model, w in weights if w])


def coarse_setup(folder, **changes):
    return dataclasses.replace(make_setup(folder, **changes), merge_hash=coarse)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return log_of(
        run(coarse_setup(tmp_path_factory.mktemp("reference"), evaluations=12), FormulaPool())
    )


def test_duplicates_are_told_and_not_scored(tmp_path):
    pool = FormulaPool()
    ledger = run(coarse_setup(tmp_path, evaluations=12), pool)
    told = [record for record in ledger.candidates if record.state == "duplicate"]
    assert len(told) >= 3
    firsts = {}
    for record in ledger.records:
        first = firsts.setdefault(coarse(record.recipe), record)
        assert record.result.fitness == first.result.fitness
        assert record.result.duplicate_of == (None if first is record else first.number)
        assert record.result.examples == (40 if first is record else 0)
    assert len({record.recipe.hash for record in told}) == len(told), "no two recipes are equal"
    searched = {(trial, chunk) for trial, role, chunk in pool.jobs if role == "search"}
    assert {trial for trial, _ in searched} == {first.number for first in firsts.values()}
    assert len(searched) == 4 * len(firsts)
    assert ledger.num_evaluations == 12


def test_baselines_that_are_one_merge_are_scored_once_and_confirmed_once(tmp_path):
    pool = FormulaPool()
    setup = coarse_setup(tmp_path, evaluations=12)
    ledger = run(setup, pool)
    base, parent = ledger.baselines["base"], ledger.baselines["parent:a"]
    assert parent.result.duplicate_of == base.number
    assert parent.result.tasks == base.result.tasks
    confirmed = {trial for trial, role, _ in pool.jobs if role == "confirm"}
    assert base.number in confirmed
    assert parent.number not in confirmed
    confirm = StudyView(setup.config).summary["confirm"]
    assert confirm["parent:a"]["objective"] == confirm["base"]["objective"]


def test_relative_objectives_know_parents_that_are_duplicates(tmp_path):
    changes = "objective: {scores: parent_relative}\n"
    plain = run(make_setup(tmp_path / "plain", changes=changes), FormulaPool())
    folder = tmp_path / "coarse"
    same = dataclasses.replace(
        make_setup(folder, changes=changes),
        merge_hash=lambda r: "parent a" if r in first_parents(plain) else r.hash,
    )
    ledger = run(same, FormulaPool())
    assert ledger.baselines["base"].result.fitness is not None
    assert ledger.baselines["parent:a"].state == "duplicate"


def first_parents(ledger):
    return [ledger.baselines[name].recipe for name in ("base", "parent:a")]


@pytest.mark.parametrize("crash_after", [3, 9, 17, 30, 45, 55])
def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path, reference, crash_after):
    setup = coarse_setup(tmp_path, evaluations=12)
    with pytest.raises(Killed):
        run(setup, FormulaPool(crash_after=crash_after))
    assert log_of(run(setup, FormulaPool(seed=9, num_workers=3))) == reference


def test_an_older_study_keeps_what_it_scored(tmp_path):
    """It knew fewer merges as the same; what is finished stays and counts as it did."""
    before = run(make_setup(tmp_path, evaluations=12), FormulaPool())
    log = log_of(before)
    pool = FormulaPool()
    after = run(coarse_setup(tmp_path, evaluations=12), pool)
    assert log_of(after) == log
    assert pool.jobs == []
    longer = run(coarse_setup(tmp_path, evaluations=15), FormulaPool())
    assert log_of(longer)[: len(log)] == log
    assert longer.num_evaluations == 15


def test_a_ledger_without_models_knows_duplicates_from_the_records(tmp_path):
    ledger = run(coarse_setup(tmp_path, evaluations=12), FormulaPool())
    read = Ledger(ledger.records)
    assert read.num_evaluations == 12
    originals = [read.original_of(record) for record in read.records]
    assert originals == [ledger.original_of(record) for record in ledger.records]


def test_duplicates_of_failures_fail_with_the_reason(tmp_path):
    pool = FormulaPool(fault=lambda job: "invalid" if job.trial == 5 else None)
    ledger = run(coarse_setup(tmp_path, evaluations=12), pool)
    same = [r for r in ledger.candidates if r.result.duplicate_of == 5]
    assert same
    for record in same:
        assert record.state == "invalid"
        assert record.result.error == "same merge as trial 5: injected invalid"
    assert isinstance(ledger[5].result, TrialResult)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "a", folder / "copy")
    return folder


def few_merges(world, name):
    """A search over three weights of two parents: nine recipes of linear, five merges."""
    data = settings(
        world,
        name,
        merge={"method": "linear"},
        space={"weight": {"choices": [0.2, 0.4, 0.8]}},
    )
    data["study"]["budget"] = {"evaluations": 4}
    data["suite"] |= {"items": {"search": 8, "confirm": 0}, "chunks": 1}
    return data


def test_a_real_search_scores_each_mean_once_and_resumes(world):
    view = evomerge.search(few_merges(world, "whole"))
    done = [record for record in view.ledger.candidates if record.state == "done"]
    told = [record for record in view.ledger.candidates if record.state == "duplicate"]
    ratios = [r.values["weight.a"] / r.values["weight.b"] for r in done]
    assert len(done) == len({round(ratio, 6) for ratio in ratios}) >= 2
    assert 1.0 not in ratios, "that is the baseline `uniform`"
    uniform = view.ledger.baselines["uniform"].number
    assert any(r.result.duplicate_of == uniform for r in told)
    hashes = {r.number: r.recipe.hash for r in view.ledger.records}
    assert any(hashes[r.result.duplicate_of] != hashes[r.number] for r in told)
    counted = [0]

    def stop():
        counted[0] += 1
        return counted[0] > 9

    config = make_search(few_merges(world, "stopped"))
    with pytest.raises(InterruptedStudy):
        run_search(config, interrupted=stop)
    run_search(config, resume=True)
    assert log_of(StudyView(config).ledger) == log_of(view.ledger)


def test_a_search_with_an_inert_knob_says_so_and_runs(world):
    data = few_merges(world, "inert")
    data["models"]["parents"] = {"a": data["models"]["parents"]["a"]}
    data |= {"merge": {"method": "ties"}, "proposer": {"population": 4}}
    data["space"] = {"weight": {"search": [0.2, 1.0]}, "density": {}}
    path = world / "inert.yaml"
    path.write_text(yaml.safe_dump(data))
    line = "weight.a has no effect: ties with one parent normalises it away. Remove it from space."
    runner = CliRunner()
    checked = runner.invoke(check, [str(path)])
    assert f"warning: {line}\n" in checked.stdout
    assert "see the warnings" in checked.stdout
    facts = json.loads(runner.invoke(check, [str(path), "--json"]).stdout)
    assert facts["findings"] == [{"knobs": ["weight.a"], "sentence": line}]
    searched = runner.invoke(search, [str(path)])
    assert searched.exit_code == 0, searched.output
    assert searched.stderr.replace("\n", " ").count("warning: weight.a has no effect") == 1
    assert line in (world / "runs" / "inert" / "logs" / "driver.log").read_text()
    view = StudyView(make_search(data))
    assert view.ledger.num_evaluations == 4
    assert view.ledger.baselines["uniform"].result.duplicate_of == 1
