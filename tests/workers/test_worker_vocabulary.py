"""A worker scores models whose vocabularies differ as the exported folder would."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.config.recipe import Recipe
from evomerge.config.search import make_search
from evomerge.evaluate.tasks import load_tasks
from evomerge.merging.run import merge
from evomerge.workers.job import Job, WorkerSettings
from evomerge.workers.worker import Worker
from tests.world import make_world, settings

NAMES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def renumber(folder):
    """Turn the order of the characters round, and add a row; it stays the same model."""
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    old = stored["model"]["vocab"]
    size = len(old)
    new = {token: n if n < 4 else size + 3 - n for token, n in old.items()}
    stored["model"]["vocab"] = new
    path.write_text(json.dumps(stored))
    tensors = load_file(folder / "model.safetensors")
    order = torch.tensor([old[token] for token in sorted(new, key=new.__getitem__)])
    for name in NAMES:
        tensors[name] = torch.cat([tensors[name][order], torch.full((1, 32), 9.0)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size + 1}))


def settings_of(world, tokenizer):
    """What a worker of the world's search prepares."""
    config = make_search(settings(world))
    models = (config.models.base, *config.models.parents.values())
    by_name = dict(zip(("base", "a", "b"), models, strict=True))
    return WorkerSettings(models, by_name[tokenizer], "float32", config.suite, 1, "cpu")


def score(world, tokenizer, recipes):
    """Run a job for each recipe on one worker."""
    config = make_search(settings(world))
    worker = Worker(settings_of(world, tokenizer), "w")
    chunk = load_tasks(config.suite).chunks("search")[0]
    return [worker.run(Job(number, recipe, chunk)) for number, recipe in enumerate(recipes)]


def recipe_of(world, method, tokenizer, **weights):
    models = [
        {"model": str(world / name), "parameters": {"weight": weight} if weight else {}}
        for name, weight in weights.items()
    ]
    data = {"merge_method": method, "models": models, "out_dtype": "float32"}
    return Recipe.model_validate_json(
        json.dumps({**data, "tokenizer_source": str(world / tokenizer)})
    )


def test_a_renumbered_parent_is_the_same_parent(world, tmp_path):
    before = recipe_of(world, "linear", "base", a=0.3, b=0.7)
    alone = recipe_of(world, "passthrough", "base", b=None)
    plain = score(world, "base", [before, alone])
    renumber(world / "b")
    moved = score(world, "base", [before, alone])
    assert [outcome.error for outcome in (*plain, *moved)] == [None] * 4
    assert [outcome.digest for outcome in moved] == [outcome.digest for outcome in plain]
    assert [outcome.result for outcome in moved] == [outcome.result for outcome in plain]
    assert merge(before, tmp_path / "out") == moved[0].digest
    # the parent's own numbers: another order of rows and one row more, alone and merged
    other = [
        recipe_of(world, "linear", "b", a=0.3, b=0.7),
        recipe_of(world, "passthrough", "b", b=None),
    ]
    renumbered = score(world, "b", other)
    assert [outcome.error for outcome in renumbered] == [None, None]
    assert merge(other[0], tmp_path / "other") == renumbered[0].digest
