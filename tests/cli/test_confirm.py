"""`evomerge confirm` and the verdict on screen, on a real study with report items."""

import json

import pytest
from click.testing import CliRunner

from evomerge.cli.main import cli
from evomerge.config.mergekit import read_recipe
from evomerge.errors import StudyError
from evomerge.study.view import load_study
from tests.world import make_world, settings, write_config

ITEMS = {"search": 8, "confirm": 6, "report": 10}  # of 40: twice 16 and 8 is all there is


def evomerge(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    suite = {**settings(world)["suite"], "items": ITEMS}
    path = write_config(world, "judged", suite=suite)
    run = evomerge("search", path)
    assert run.exit_code == 0, run.stderr
    return path


def json_of(*arguments):
    run = evomerge(*arguments, "--json")
    assert run.exit_code == 0, run.stderr
    return json.loads(run.stdout)


def test_a_second_confirmation_is_on_fresh_items_and_a_third_has_none(config):
    first = json_of("status", config)
    assert first["confirmations"] == 1
    assert first["verdict"]["num_items"] == 2 * ITEMS["report"]
    assert first["verdict"]["outcome"] in ("better", "no_evidence", "void")

    run = evomerge("confirm", config)
    assert run.exit_code == 0, run.stderr
    second = json_of("status", config)
    assert second["confirmations"] == 2
    assert second["trials"] == first["trials"], "nothing is searched"
    assert second["verdict"]["sentence"] in run.stdout
    once, again = load_study(config).confirmations
    for task in ("tiny_choice", "tiny_answer"):
        ids = [set(c.used[task]["test"]) for c in (once, again)]
        assert [len(i) for i in ids] == [16, 16]
        assert not ids[0] & ids[1]

    third = evomerge("confirm", config).exception
    assert isinstance(third, StudyError)
    assert "no confirm items are left that were not used" in str(third)


def test_the_confirmed_winner_is_exported_with_its_verdict(config, tmp_path):
    study = load_study(config)
    last = study.confirmations[-1]
    (exported,) = json_of("export", config, "--out", tmp_path)
    assert exported["trial"] == last.trial
    text = (tmp_path / f"trial-{last.trial:05d}.yaml").read_text()
    assert last.verdict.sentence in " ".join(text.replace("\n# ", " ").split())
    assert read_recipe(tmp_path / f"trial-{last.trial:05d}.yaml") == study.ledger[last.trial].recipe
