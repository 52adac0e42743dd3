"""Searches with settings of the merge: part of every recipe, of the export and of the identity."""

import pytest
import torch
import yaml
from click.testing import CliRunner

import evomerge
from evomerge.cli.check import check
from evomerge.config.mergekit import read_recipe, write_recipe
from evomerge.errors import StudyError
from evomerge.study.export import export_trial
from tests.world import make_world, settings

TIES = {"weight": {"search": [0.2, 1.0]}, "density": {"search": [0.2, 0.9]}}
SUM = {"weight": {"search": [0.0, 1.0]}}
CASES = {
    "index": ("ties", TIES, {"threshold_ties": "index"}),
    "hash": ("breadcrumbs", TIES, {"threshold_ties": "hash"}),
    "dither": ("task_arithmetic", SUM, {"rounding": "dither"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), torch.bfloat16)


def short(world, name, method, space, given):
    """A search of one generation on few items."""
    data = settings(world, name, merge={"method": method, **given}, space=space)
    data["study"]["budget"] = {"evaluations": 4}
    data["suite"] |= {"items": {"search": 8, "confirm": 0}, "chunks": 1}
    return data


@pytest.mark.parametrize("case", CASES)
def test_a_search_and_its_export(world, tmp_path, case):
    method, space, given = CASES[case]
    view = evomerge.search(short(world, case, method, space, given))
    done = [record for record in view.ledger.candidates if record.state == "done"]
    assert len(done) == 4
    ((name, value),) = given.items()
    for record in done:
        assert getattr(record.recipe, name) == value
        assert (record.recipe.mask_seed != 0) == (case != "index")
    best = max(done, key=lambda record: record.result.fitness)
    exported = export_trial(view, best, tmp_path / "winner.yaml", tmp_path / "winner")
    assert exported.digest == best.result.digest
    assert read_recipe(tmp_path / "winner.yaml") == best.recipe
    text = (tmp_path / "winner.yaml").read_text()
    assert f"# not to be replayed by mergekit: it ignores {name}\n" in text
    assert "mergekit cannot replay the recipe" in (tmp_path / "winner" / "README.md").read_text()
    plain = best.recipe.model_copy(update={name: type(best.recipe).model_fields[name].default})
    (tmp_path / "plain.yaml").write_text(write_recipe(plain))
    assert evomerge.merge(tmp_path / "plain.yaml", tmp_path / "plain") != best.result.digest


def test_check_shows_what_is_not_the_default(world, tmp_path):
    for given, shown in (
        ({}, "task_arithmetic, written as bfloat16\n"),
        ({"rounding": "dither"}, "task_arithmetic, written as bfloat16, rounding: dither\n"),
    ):
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump(short(world, "check", "task_arithmetic", SUM, given)))
        result = CliRunner().invoke(check, [str(path)])
        assert result.exit_code == 0, result.output
        assert f": {shown}" in result.output


def test_another_setting_is_another_study_and_the_default_none(world):
    plain = short(world, "identity", "task_arithmetic", SUM, {})
    evomerge.search(plain)
    said = {"threshold_ties": "keep", "rounding": "nearest"}
    evomerge.search(short(world, "identity", "task_arithmetic", SUM, said), resume=True)
    changed = short(world, "identity", "task_arithmetic", SUM, {"rounding": "dither"})
    with pytest.raises(StudyError, match=r'merge\.rounding was null, is now "dither"'):
        evomerge.search(changed, resume=True)
