"""The commands as a user meets them: what they print, and that programs get the same facts."""

import json
import re

import pytest

from evomerge.study.summary import STATES
from evomerge.study.view import load_study
from tests.world import evomerge, make_world, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(world):
    """The config of a finished search."""
    path = write_config(world, "commands")
    run = evomerge("search", path)
    assert run.returncode == 0, run.stderr
    assert "8/8 candidates asked" in run.stderr
    assert "confirm items, unseen by the search" in run.stdout
    return path


def json_of(*arguments):
    run = evomerge(*arguments, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_check_says_what_would_run(world, config):
    text = evomerge("check", config)
    assert text.returncode == 0, text.stderr
    assert "nothing is wrong" in text.stdout
    assert (
        "confirmation: the winner is chosen on 16 items; no verdict without report items: give "
        "suite.items.report a count\n" in text.stdout
    )
    facts = json_of("check", config)
    assert [knob["name"] for knob in facts["knobs"]] == ["weight.a", "weight.b"]
    assert facts["examples_per_evaluation"] == 32
    assert facts["tasks"]["tiny_choice"]["items"] == {"search": 16, "confirm": 8, "report": 0}
    assert facts["tasks"]["tiny_answer"]["metric"] == "exact_match,whole"
    size = sum((world / name / "model.safetensors").stat().st_size for name in ("base", "a", "b"))
    assert 0.9 * size < facts["bytes"] <= size


def test_status_json_has_the_promised_fields(config):
    status = json_of("status", config)
    view = load_study(config)
    assert {"study", "state", "trials", "best", "baselines", "examples_scored", "seconds"} <= set(
        status
    )
    assert status["trials"]["done"] == 12
    assert {"failed", "duplicate", "running"} <= set(status["trials"])
    assert status["best"]["trial"] == view.best.number
    assert status["best"]["tasks"] == {t: m.value for t, m in view.best.result.tasks.items()}
    assert (
        status["baselines"]["parent:a"]["objective"]
        == view.ledger.baselines["parent:a"].result.fitness
    )
    assert status["verdict"] is None
    journal = config.parent / "runs" / "commands" / "journal.log"
    assert json_of("status", "commands", "--storage", journal) == status


def test_export_top_and_single_trials(config, tmp_path):
    (winner,) = json_of("export", config, "--out", tmp_path / "one")
    top = json_of(
        "export", config, "--top", 3, "--out", tmp_path / "top", "--weights", tmp_path / "w"
    )
    assert winner["trial"] == json_of("status", config)["confirm"]["winner"]["trial"]
    assert [e["objective"] for e in top] == sorted((e["objective"] for e in top), reverse=True)
    digests = {r.number: r.result.digest for r in load_study(config).ledger.records}
    assert [e["digest"] for e in top] == [digests[e["trial"]] for e in top]
    assert (tmp_path / "w" / f"trial-{top[2]['trial']:05d}" / "model.safetensors").exists()
    refused = evomerge("export", config, "--trial", 99)
    assert refused.returncode == 1
    assert "there is no trial 99; it has 0 to 12" in refused.stderr


def test_merge_and_eval_give_the_scored_model_and_its_scores(config, tmp_path):
    (exported,) = json_of("export", config, "--out", tmp_path)
    merged = evomerge("merge", exported["recipe"], tmp_path / "merged")
    best = load_study(config).winner
    assert merged.stdout.split()[:3] == [str(tmp_path / "merged"), "digest", best.result.digest]
    again = evomerge("merge", exported["recipe"], tmp_path / "merged")
    assert again.returncode == 1
    assert "Traceback" not in again.stderr
    scores = json_of("eval", tmp_path / "merged", "--suite", config, "--role", "search")
    assert scores["digest"] == best.result.digest
    assert (
        scores["tasks"]["tiny_choice"]["acc,none"]["value"]
        == best.result.tasks["tiny_choice"].value
    )
    empty = evomerge("eval", tmp_path / "merged", "--suite", config, "--role", "report")
    assert empty.returncode == 1
    assert re.search(r"commands\.yaml:\d+: suite\.items\.report: has no items", empty.stderr)


def test_every_line_of_the_log_names_its_trial(config):
    log = config.parent / "runs" / "commands" / "logs" / "driver.log"
    lines = log.read_text().splitlines()
    assert all(re.match(r"[\d-]+ [\d:,]+ \w+ trial=(\d+|-) ", line) for line in lines)
    assert {f"trial={n}" for n in range(12)} <= {w for line in lines for w in line.split()}


def test_resume_with_a_larger_budget_goes_on(config):
    before = load_study(config).trials
    changes = ("--set", "study.budget.evaluations=12")
    journal = config.parent / "runs" / "commands" / "journal.log"
    run = evomerge("resume", "commands", "--storage", journal, *changes)
    assert run.returncode == 0, run.stderr
    after = load_study(config).trials
    assert len(after) == 17
    assert after.iloc[:13].equals(before)


def test_what_an_error_says_is_printed_as_it_is(world, capsys):
    """rich reads `[/x]` as markup; an error may hold anything."""
    from evomerge.cli.progress import Progress
    from evomerge.config.search import load_search

    config = load_search(write_config(world, "markup"))
    summary = {
        "state": "done", "evaluations": 1, "best": None, "baselines": {}, "examples_scored": 0,
        "seconds": 0.0, "last_error": "trial 5: bad [/x] [bold] tasks[0]",
        "trials": dict.fromkeys(STATES, 1),
    }  # fmt: skip
    with Progress(config) as progress:
        progress.show(summary)
    assert "trial 5: bad [/x] [bold] tasks[0]" in capsys.readouterr().err


def test_the_command_that_goes_on_is_the_whole_command():
    from evomerge.cli.options import command_line

    line = command_line("resume", "my study.yaml", None, ("a.b=1", "c=[1, 2]"))
    assert line == "evomerge resume 'my study.yaml' --set a.b=1 --set 'c=[1, 2]'"
    assert command_line("resume", "s", "sqlite:///x.db", ()) == (
        "evomerge resume s --storage sqlite:///x.db"
    )
