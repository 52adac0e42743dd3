"""The memory plan: sizes add up, and the choice follows from what is free."""

import dataclasses
import math

import pytest
import torch

from evomerge.checkpoints.arena import layout_for, load_arena
from evomerge.checkpoints.source import MemorySource
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.kernels.streamed import SCRATCH_BYTES
from evomerge.merging import memory
from evomerge.merging.memory import (
    MAPPED_BYTES_PER_S,
    PINNED_BYTES_PER_S,
    SPARE,
    Memory,
    Needs,
    gib,
    memory_plan,
    needs_of,
)
from evomerge.methods import METHODS
from evomerge.methods.method import Values

GIB = 2**30
SIZE = int(13.5 * GIB)
NEEDS = Needs({"base": SIZE, "a": SIZE, "b": SIZE, "c": SIZE}, live_bytes=SIZE)
LARGE_HOST = Memory(free_bytes=500 * GIB, total_bytes=512 * GIB)


def gpu(free):
    return Memory(free_bytes=int(free * GIB), total_bytes=140 * GIB)


def test_sizes_are_those_of_what_is_loaded():
    tensors = {
        "up": torch.ones(64, 128, dtype=torch.bfloat16),
        "norm": torch.ones(128),
        "ids": torch.ones(3, dtype=torch.int64),
    }
    sources = {name: MemorySource(tensors, name) for name in ("base", "a", "b")}
    needs = needs_of(sources, "base", torch.float16, "ties")
    own = sum(tensor.nbytes for tensor in tensors.values())
    assert needs == Needs(dict.fromkeys(sources, own), live_bytes=2 * (64 * 128 + 128) + 24)
    arena = load_arena(sources["a"], layout_for(sources["a"], "cpu")).arena
    used = arena.layout.num_bytes * (1 - arena.layout.padding_share)
    assert used == pytest.approx(needs.source_bytes["a"])


@pytest.mark.parametrize("name", METHODS)
def test_tables_are_what_methods_keep(name):
    method, num_parents = METHODS[name], METHODS[name].max_parents or 2
    generator = torch.Generator().manual_seed(0)
    base, *parents = (torch.randn(8 * 8, generator=generator) for _ in range(1 + num_parents))
    cache = StatisticsCache()
    models = tuple(f"parent {i}" for i in range(num_parents))
    has_base = method.has_deltas(True)
    facts = TensorStatistics(
        "up",
        base if has_base else None,
        parents,
        "base" if has_base else None,
        models,
        cache=cache,
        shape=(8, 8),
    )
    chosen = {"density": 0.5, "weight": 0.7}
    values = {
        p.name: chosen.get(p.name, 0.5 if p.default is None else p.default) for p in method.params
    }
    table = method.table(
        Values(
            {p.name: (values[p.name],) * num_parents for p in method.params if p.per_model},
            {p.name: values[p.name] for p in method.params if not p.per_model},
        ),
        facts,
    )
    if hasattr(table, "run"):
        table.run(base.reshape(8, 8), [parent.reshape(8, 8) for parent in parents])
    sources = {n: MemorySource({"up": torch.ones(8, 8)}, n) for n in ("base", *models)}
    needs = needs_of(sources, "base", torch.float32, name)
    kept = [fact for fact in cache._facts.values() if isinstance(fact, torch.Tensor)]
    assert needs.rank_bytes == sum(fact.nbytes for fact in kept if fact.dtype == torch.uint8)
    assert needs.kept_bytes == sum(tensor.nbytes for _, tensor in cache._tensors.values())


def test_kept_tensors_are_bounded():
    huge = {
        n: MemorySource({"up": torch.empty(2**20, 2**13, device="meta")}) for n in ("base", "a")
    }
    assert (
        needs_of(huge, "base", torch.bfloat16, "tsv").kept_bytes
        == StatisticsCache().max_tensor_bytes
    )
    assert needs_of(huge, "base", torch.bfloat16, "della").rank_bytes == 2**33


def test_on_a_cpu_files_are_shared_and_live_models_are_not():
    plan = memory_plan(NEEDS, 4, 0, LARGE_HOST, None)
    assert (plan.choice, plan.streaming_s) == ("mapped", 0)
    assert plan.left_bytes == (500 * GIB - 8 * SIZE) // 4
    assert memory_plan(NEEDS, 4, 0, None, None).left_bytes is None


def test_on_a_cpu_with_too_little_memory():
    plan = memory_plan(NEEDS, 4, 0, Memory(70 * GIB, 80 * GIB), None)
    assert plan.choice == "mapped"
    assert "reads some from disk again" in plan.why
    assert plan.left_bytes == (70 * GIB - 4 * SIZE) // 4
    plan = memory_plan(NEEDS, 4, 0, Memory(56 * GIB, 80 * GIB), None)
    assert plan.choice == "too large"
    assert "need 54.0 GiB in all, and 56.0 GiB are free; use fewer workers" in plan.why


def test_on_a_gpu_with_room_for_all():
    plan = memory_plan(NEEDS, 1, 1, LARGE_HOST, gpu(139))
    assert plan.choice == "resident"
    assert plan.left_bytes == 139 * GIB - 5 * SIZE
    assert "14.0 GiB kept for activations" in plan.why


def test_the_edge_between_resident_and_streamed():
    spare = int(140 * GIB * SPARE)
    enough = 5 * SIZE + spare
    resident = memory_plan(NEEDS, 1, 1, LARGE_HOST, Memory(enough, 140 * GIB))
    streamed = memory_plan(NEEDS, 1, 1, LARGE_HOST, Memory(enough - 1, 140 * GIB))
    assert (resident.choice, streamed.choice) == ("resident", "streamed")
    assert streamed.left_bytes == enough - 1 - SIZE - 2 * SCRATCH_BYTES
    least = SIZE + 2 * SCRATCH_BYTES + spare
    assert memory_plan(NEEDS, 1, 1, LARGE_HOST, Memory(least, 140 * GIB)).choice == "streamed"
    plan = memory_plan(NEEDS, 1, 1, LARGE_HOST, Memory(least - 1, 140 * GIB))
    assert plan.choice == "too large"
    assert "(workers.gpus)" in plan.why


def test_what_streaming_costs():
    plan = memory_plan(NEEDS, 1, 1, LARGE_HOST, gpu(60))
    assert plan.pinned
    assert plan.streaming_s == 4 * SIZE / PINNED_BYTES_PER_S
    assert "at an assumed 50 GB/s" in plan.why
    assert "1.2 s" in plan.why
    # four buffers of 13.5 GiB take 16 GiB each
    assert "64.0 GiB of pinned host memory" in plan.why
    della = dataclasses.replace(NEEDS, rank_bytes=3 * SIZE // 2)
    assert memory_plan(della, 1, 1, LARGE_HOST, gpu(60)).streaming_s == pytest.approx(
        5.5 * SIZE / PINNED_BYTES_PER_S
    )


def test_what_the_host_cannot_pin_comes_from_files():
    for workers, host in ((1, Memory(70 * GIB, 80 * GIB)), (8, LARGE_HOST), (1, None)):
        plan = memory_plan(NEEDS, workers, 1, host, gpu(60))
        assert (plan.choice, plan.pinned) == ("streamed", False)
        assert plan.streaming_s == 4 * SIZE / MAPPED_BYTES_PER_S
        assert "mapped files" in plan.why


def test_workers_that_share_a_gpu_share_its_memory():
    assert memory_plan(NEEDS, 2, 0.5, LARGE_HOST, gpu(139)).choice == "streamed"
    half = memory_plan(
        dataclasses.replace(NEEDS, source_bytes={"a": SIZE}), 2, 0.5, LARGE_HOST, gpu(139)
    )
    assert (half.choice, half.left_bytes) == ("resident", 139 * GIB // 2 - 2 * SIZE)
    assert memory_plan(NEEDS, 1, 2, LARGE_HOST, gpu(139)) == memory_plan(
        NEEDS, 1, 1, LARGE_HOST, gpu(139)
    )


def test_without_the_gpu_it_says_what_one_needs():
    plan = memory_plan(NEEDS, 1, 1, LARGE_HOST, None)
    assert (plan.choice, plan.left_bytes) == ("unknown", None)
    assert "needs 67.5 GiB of one, or 14.0 GiB if sources are streamed" in plan.why
    small = Needs({"a": 2**20}, live_bytes=2**20)
    assert "streamed" not in memory_plan(small, 1, 1, LARGE_HOST, None).why


def test_this_machine():
    found = memory.host_memory()
    assert found is not None
    assert 0 < found.free_bytes <= found.total_bytes
    assert math.isclose(found.total_bytes, torch_total(), rel_tol=0.02)


def torch_total():
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0 MiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.5 GiB")]
)
def test_bytes_as_text(num_bytes, text):
    assert gib(num_bytes) == text
