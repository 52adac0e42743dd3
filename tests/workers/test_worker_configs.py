"""A worker answers with the config that the exported folder has, not always with the base's."""

import json
import shutil

import pytest
import torch

from evomerge.checkpoints.sidecars import (
    CONFIG_FILES,
    configs_of,
    copy_sidecars,
    sidecars_hash,
)
from evomerge.config.models import ModelRef
from evomerge.config.search import make_search
from evomerge.evaluate.evaluator import join_results
from evomerge.evaluate.tasks import load_tasks
from evomerge.workers.job import Job
from evomerge.workers.live_model import load_live_model, take_token_ids
from evomerge.workers.score_model import score_model
from evomerge.workers.worker import Worker
from tests.workers.test_worker_vocabulary import recipe_of, settings_of
from tests.world import make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parent `a` turns its positions much faster than the base."""
    world = make_world(tmp_path_factory.mktemp("world"))
    path = world / "a" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    path.write_text(json.dumps({**config, "rope_theta": 7.0}))
    return world


def test_a_parent_scores_what_it_scores_alone(world):
    suite = make_search(settings(world)).suite
    worker = Worker(settings_of(world, "base"), "w")
    chunks = load_tasks(suite).chunks("search")
    facts = worker.facts()
    found = {}
    for name in ("base", "a", "b", "a"):
        recipe = recipe_of(world, "passthrough", "base", **{name: None})
        outcomes = [worker.run(Job(0, recipe, chunk)) for chunk in chunks]
        assert [outcome.error for outcome in outcomes] == [None] * len(chunks)
        alone = score_model(ModelRef(path=str(world / name)), suite, "search").items
        assert join_results([outcome.result for outcome in outcomes]) == alone, name
        found[name] = alone
    assert found["a"] != found["b"]
    assert worker.facts() == facts


def test_a_studys_identity_sees_configs_and_tokenizers(world):
    before = sidecars_hash(world / "b")
    for name in ("config.json", "tokenizer.json"):
        text = (world / "b" / name).read_text()
        (world / "b" / name).write_text(text + "\n")
        assert sidecars_hash(world / "b") != before, name
        (world / "b" / name).write_text(text)
    assert sidecars_hash(world / "b") == before


def test_token_ids_of_a_live_model_are_those_of_the_files(world, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(world / "b", other)
    for name in CONFIG_FILES:
        config = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps({**config, "eos_token_id": 7, "bos_token_id": None}))
    (tmp_path / "out").mkdir()
    copy_sidecars(world / "base", other, tmp_path / "out", dtype=None, numbered_by=other)
    live = load_live_model(world / "base", torch.float32, None, "cpu")
    take_token_ids(live, world / "base", other)
    exported = configs_of(tmp_path / "out")
    for name, own in zip(CONFIG_FILES, (live.config, live.generation_config), strict=True):
        ids = {key: value for key, value in exported[name].items() if key.endswith("_token_id")}
        assert ids["eos_token_id"] == 7
        assert {key: getattr(own, key) for key in ids} == ids
