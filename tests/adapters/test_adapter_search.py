"""A search over adapters: parents are model+adapter, everything else is as ever."""

import json

import pytest
import torch
from safetensors.torch import load_file

import evomerge
from evomerge.adapters.open import open_model
from evomerge.config.recipe import Recipe, Source
from evomerge.errors import StudyError
from evomerge.merging.run import merge
from evomerge.study.export import export_trial
from evomerge.workers.score_model import score_model
from tests.adapters.small import layer, make_adapter, reference
from tests.world import make_world, settings, write_config

MODULES = [layer(n, m) for n in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"), torch.bfloat16)
    for seed, name in ((1, "one"), (2, "two")):
        ranks = dict.fromkeys(MODULES, 4)
        make_adapter(folder / name, folder / "base", seed, ranks, lora_alpha=60)
    return folder


@pytest.fixture(scope="module")
def config(world):
    parents = {name: f"./base+./{name}" for name in ("one", "two")}
    usual = settings(world)
    return write_config(
        world,
        "adapters",
        models={"base": "./base", "parents": parents},
        study={**usual["study"], "name": "adapters", "budget": {"evaluations": 2}},
        suite={**usual["suite"], "items": {"search": 8, "confirm": 0}, "chunks": 1},
    )


@pytest.fixture(scope="module")
def study(config):
    return evomerge.search(config)


def test_parents_are_scored_with_their_adapters(world, study):
    digests = {trial.baseline: trial.result.digest for trial in study.ledger.records}
    base = score_model(reference(world / "base"), study.config.suite, "search").digest
    assert digests["base"] == base
    for name in ("one", "two"):
        ref = reference(world / "base", world / name)
        scores = score_model(ref, study.config.suite, "search")
        assert digests[f"parent:{name}"] == scores.digest
        assert study.summary["baselines"][f"parent:{name}"]["tasks"] == {
            task: metric.value for task, metric in scores.chosen.items()
        }
    assert len({digests[name] for name in ("base", "parent:one", "parent:two", "uniform")}) == 4


def test_what_was_scored_is_what_is_exported(study, tmp_path):
    best = study.best
    exported = export_trial(study, best, tmp_path / "winner.yaml", tmp_path / "winner")
    assert exported.digest == best.result.digest
    assert evomerge.merge(tmp_path / "winner.yaml", tmp_path / "again") == best.result.digest
    merged = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    record = json.loads((tmp_path / "again" / "evomerge.json").read_text())
    assert sum("+" in name for name in record["fingerprints"]) == 2


def test_without_a_dtype_a_merge_has_the_models(world, tmp_path):
    """A parent in float32 arithmetic does not double the size of what is written."""
    source = Source(model=reference(world / "base", world / "one"))
    recipe = Recipe(merge_method="passthrough", models=(source,))
    merge(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    adapted = open_model(source.model)
    for name, tensor in merged.items():
        assert torch.equal(tensor, adapted.read(name).bfloat16()), name
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_retrained_adapter_is_another_study(world, config, study):
    assert study.summary["state"] == "done"
    make_adapter(world / "two", world / "base", 9, dict.fromkeys(MODULES, 4), lora_alpha=60)
    with pytest.raises(StudyError, match=r"models\.two\.fingerprint was"):
        evomerge.search(config, resume=True)
