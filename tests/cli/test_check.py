"""`evomerge check` says where the sources are going to lie, in words and to programs."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from evomerge.cli.check import check
from evomerge.kernels import dispatch
from tests.world import make_world, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def checked(config, *settings):
    arguments = [str(config), *(part for setting in settings for part in ("--set", setting))]
    text, facts = (CliRunner().invoke(check, [*arguments, *more]) for more in ([], ["--json"]))
    assert text.exit_code == facts.exit_code == 0, text.output
    return text.output, json.loads(facts.output)["memory"]


def test_on_a_cpu_sources_are_mapped(world):
    text, memory = checked(write_config(world, "cpu"), "workers.count=2", "workers.pool=ray")
    assert (memory["choice"], memory["device"], memory["workers"]) == ("mapped", "CPU", 2)
    stored = (world / "base" / "model.safetensors").stat().st_size
    for name in ("base", "a", "b"):
        assert 0.9 * stored < memory["source_bytes"][name] <= stored
    assert memory["live_bytes"] == memory["source_bytes"]["base"]
    assert memory["table_bytes"] == memory["streaming_s"] == 0
    assert memory["left_bytes"] > 0
    assert "memory, with all 2 workers on this machine (CPU, " in text
    assert "sources mapped: the page cache holds the files once" in text


def test_a_candidate_reads_the_models_that_its_method_merges(world):
    linear = write_config(world, "linear", merge={"method": "linear", "out_dtype": "bfloat16"})
    _, memory = checked(linear)
    assert sorted(memory["source_bytes"]) == ["a", "b"]
    assert 2 * memory["live_bytes"] == memory["source_bytes"]["a"]
    slerp = write_config(world, "slerp", merge={"method": "slerp"}, space={"t": {}})
    _, memory = checked(slerp)
    assert sorted(memory["source_bytes"]) == ["a", "b"]
    della = write_config(
        world, "della", merge={"method": "della"}, space={"density": {}, "weight": {}}
    )
    _, memory = checked(della)
    # a byte for each float32 number of each parent
    assert memory["table_bytes"] == (memory["source_bytes"]["a"] + memory["source_bytes"]["b"]) / 4


def test_on_a_gpu_it_says_what_one_needs_where_there_is_none(world):
    text, memory = checked(write_config(world, "gpu"), "workers.gpus=1")
    if memory["choice"] == "unknown":
        assert memory["left_bytes"] is None
        assert "not known yet: this machine has no GPU; a worker needs" in text
    else:
        assert memory["choice"] == "resident"
        assert "sources resident: all of it fits" in text


def test_it_says_which_kernels_run_and_why_no_faster_ones(world, monkeypatch):
    config = write_config(world, "cpu")
    assert "merge kernels native\n" in checked(config)[0]
    none = dataclasses.replace(dispatch.NATIVE, missing=lambda: "no C compiler (cc) is found")
    monkeypatch.setattr(dispatch, "NATIVE", none)
    slow = "merge kernels reference, right but slow: no C compiler (cc) is found\n"
    assert slow in checked(config)[0]
