"""Where a worker's models lie changes nothing but the cost."""

import dataclasses

import pytest
import torch

from evomerge.checkpoints.arena import ArenaSource
from evomerge.config.search import make_search
from evomerge.errors import ConfigError
from evomerge.evaluate.tasks import load_tasks
from evomerge.merging import memory
from evomerge.workers import placement
from evomerge.workers.job import Job
from evomerge.workers.placement import Placement
from evomerge.workers.worker import Worker
from tests.workers.test_worker_vocabulary import recipe_of, settings_of
from tests.world import make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_worker_with_resident_sources_answers_the_same(world):
    chunk = load_tasks(make_search(settings(world)).suite).chunks("search")[0]
    mapped = Worker(settings_of(world, "base"), "mapped")
    resident = Worker(
        dataclasses.replace(settings_of(world, "base"), sources="resident"), "resident"
    )
    for recipe in (
        recipe_of(world, "linear", "base", a=0.3, b=0.9),
        recipe_of(world, "passthrough", "base", b=None),
        recipe_of(world, "linear", "base", a=0.7),
    ):
        here, there = (worker.run(Job(0, recipe, chunk)) for worker in (mapped, resident))
        assert here.error is None
        assert (here.digest, here.result) == (there.digest, there.result)
    kept = list(resident._placement._loaded.values())
    assert len(kept) == 2
    assert all(isinstance(source, ArenaSource) for source in kept)
    # a parameter lies where its model's arena is laid out, as in the sources' arenas
    offset = dict(resident._model.named_parameters())["model.norm.weight"].storage_offset()
    assert {source.read("model.norm.weight").storage_offset() for source in kept} == {offset}


def test_models_too_large_for_the_gpu_are_refused_before_anything_is_loaded(world, monkeypatch):
    monkeypatch.setattr(placement, "gpu_memory", lambda: memory.Memory(1000, 2000))
    worker = Worker(settings_of(world, "base"), "w")
    chosen = dataclasses.replace(settings_of(world, "base"), gpus=1.0, device="cuda")
    with pytest.raises(ConfigError, match=r"workers: without sources a worker needs"):
        Placement(chosen, worker._sources)


def test_streaming_without_a_gpu_is_refused(world):
    with pytest.raises(ConfigError, match="streamed, which is for GPUs"):
        make_search(settings(world, workers={"sources": "streamed"}))


@pytest.mark.gpu
@pytest.mark.parametrize("sources", ["mapped", "resident", "streamed"])
def test_a_gpu_answers_with_the_digest_of_the_cpu(world, sources):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    chunk = load_tasks(make_search(settings(world)).suite).chunks("search")[0]
    recipe = recipe_of(world, "linear", "base", a=0.3, b=0.9)
    on_cpu = Worker(settings_of(world, "base"), "cpu").run(Job(0, recipe, chunk))
    chosen = dataclasses.replace(
        settings_of(world, "base"), sources=sources, gpus=1.0, device="cuda"
    )
    assert Worker(chosen, "gpu").run(Job(0, recipe, chunk)).digest == on_cpu.digest
