"""The benchmark of a candidate's overhead times a real merge. Nothing here looks at a clock."""

import json
import sys

import pytest
import torch

from benchmarks import candidate_overhead as overhead
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import merged_tensors
from evomerge.space.decode import decode
from evomerge.space.genome import Genome


@pytest.mark.parametrize("method", overhead.SPACES)
def test_what_is_timed_is_the_merge(method, tmp_path):
    models = overhead.make_models(tmp_path, num_parents=2, num_layers=2)
    world = overhead.make_world(method, models)
    genome = Genome((0.25, 0.75) * (world.space.size // 2) + (0.5,) * (world.space.size % 2))
    assert list(overhead.candidate(world, genome)) == list(overhead.STEPS)
    plan = world.models.bind(decode(world.space, genome, world.template)).plan
    expected = merged_tensors(plan, world.merger.sources, StatisticsCache())
    assert len(expected) == 21
    assert world.out.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(world.out[name], tensor), name


def test_a_row_for_each_method(monkeypatch, capsys):
    arguments = "overhead --tensors 21 -n 3 --rounds 1 --json"
    monkeypatch.setattr(sys, "argv", arguments.split())
    overhead.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in rows] == list(overhead.SPACES)
    assert [row["n"] for row in rows] == [3, 3, 1, 3, 3]
    for row in rows:
        assert {"case", "k", "x_copy", "x_mergekit", "device", "commit"} < row.keys()
        steps = sum(row[f"{step}_ms"] for step in overhead.STEPS)
        assert row["ms"] == pytest.approx(steps)  # of one round, so medians add up


@pytest.mark.parametrize("text", ["3", "22", "0", "-6"])
def test_a_number_of_tensors_that_no_llama_has(text):
    with pytest.raises(overhead.argparse.ArgumentTypeError):
        overhead._tensors(text)
