"""What is written is what safetensors writes, and appears whole or not at all."""

import errno
import json
import os
import shutil
import socket
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from evomerge.checkpoints.index import STORED_DTYPES
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.shards import TensorSpec, plan_shards
from evomerge.checkpoints.sidecars import copy_sidecars
from evomerge.checkpoints.writer import write_checkpoint
from evomerge.errors import CheckpointError
from tests.checkpoints.conftest import random_bits, same_bits


def specs_of(tensors):
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def no_sidecars(folder):
    pass


def write(folder, tensors, **options):
    write_checkpoint(folder, tensors.items(), specs_of(tensors), no_sidecars, **options)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_file_is_byte_for_byte_what_safetensors_writes(tensors, tmp_path):
    tensors["unicode.wäight"] = torch.ones(3)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours = write(tmp_path / "out", tensors)
    assert contents(ours) == {"model.safetensors": (tmp_path / "theirs").read_bytes()}


@pytest.mark.parametrize("shard_bytes", [1, 60, 100, 150])
def test_shards_hold_every_bit_once_and_keep_to_the_limit(tensors, tmp_path, shard_bytes):
    folder = write(tmp_path / "out", tensors, shard_bytes=shard_bytes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert list(index["weight_map"]) == sorted(tensors)
    seen = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            held = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        assert {index["weight_map"][name] for name in held} == {path.name}
        sizes = [tensor.nbytes for tensor in held.values()]
        assert sum(sizes) <= shard_bytes or sum(size > 0 for size in sizes) == 1
        seen |= held
    count = len(list(folder.glob("*.safetensors")))
    assert sorted({*index["weight_map"].values()}) == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert all(same_bits(seen[name], tensors[name]) for name in tensors)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3), st.sampled_from([*STORED_DTYPES.values()])
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 200),
    st.randoms(use_true_random=False),
)
def test_written_tensors_read_back_whatever_their_order(tmp_path_factory, kinds, limit, random):
    tensors = {
        name: random_bits(shape, dtype, seed)
        for seed, (name, (shape, dtype)) in enumerate(kinds.items())
    }
    base = tmp_path_factory.mktemp("order")
    once = write(base / "once", tensors, shard_bytes=limit)
    arriving, announced = list(tensors.items()), specs_of(tensors)
    random.shuffle(arriving)
    random.shuffle(announced)
    write_checkpoint(base / "again", arriving, announced, no_sidecars, limit)
    assert contents(base / "again") == contents(once)
    source = open_checkpoint(once)
    assert source.names() == tuple(sorted(tensors))
    assert all(same_bits(source.read(name), tensors[name]) for name in tensors)
    shutil.rmtree(base)


def test_a_shard_is_filled_to_the_last_byte():
    specs = [TensorSpec(name, (10,), torch.float32) for name in "abcde"]
    assert [sorted(shard.offsets) for shard in plan_shards(specs, 80)] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert [sorted(shard.offsets) for shard in plan_shards(specs, 79)] == [
        [name] for name in "abcde"
    ]


def test_the_plan_aligns_every_tensor(tensors):
    for limit in (60, 2**30):
        for shard in plan_shards(specs_of(tensors), limit):
            assert len(shard.header) % 8 == 0
            for name, start in shard.offsets.items():
                assert start % tensors[name].itemsize == 0


def test_tensors_that_are_not_contiguous_are_written_in_logical_order(tmp_path):
    tensor = random_bits((5, 3), torch.float32, 0)
    folder = write(tmp_path / "out", {"w": tensor.T, "v": tensor[::2]})
    assert same_bits(open_checkpoint(folder).read("w"), tensor.T)
    assert same_bits(open_checkpoint(folder).read("v"), tensor[::2])


@pytest.mark.parametrize("shard_bytes", [3000, 2**30])
def test_transformers_loads_what_was_written_bit_by_bit(llama_folder, tmp_path, shard_bytes):
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(llama_folder)
    stream = ((name, source.read(name)) for name in source.names())
    specs = [TensorSpec(name, source.shape(name), source.dtype(name)) for name in source.names()]
    out = tmp_path / "out"
    write_checkpoint(
        out,
        stream,
        specs,
        lambda folder: copy_sidecars(llama_folder, llama_folder, folder, dtype="bfloat16"),
        shard_bytes,
    )
    assert (out / "model.safetensors").exists() == (shard_bytes == 2**30)
    ours, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    theirs = AutoModelForCausalLM.from_pretrained(llama_folder, dtype="auto").state_dict()
    assert not any(info.values())
    assert sorted(ours.state_dict()) == sorted(theirs)
    assert all(same_bits(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


# whole or not at all


def test_sidecars_are_written_before_the_folder_appears(tensors, tmp_path):
    out = tmp_path / "deep" / "out"

    def sidecars(folder):
        assert not out.exists()
        assert (folder / "model.safetensors").stat().st_size > 0
        (folder / "config.json").write_text("{}")

    write_checkpoint(out, tensors.items(), specs_of(tensors), sidecars)
    assert sorted(contents(out)) == ["config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "failure", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "x")]
)
@pytest.mark.parametrize("after", [0, 3, 8])
def test_a_fault_in_the_stream_leaves_nothing_and_comes_through(tensors, tmp_path, failure, after):
    def stream():
        yield from list(tensors.items())[:after]
        raise failure

    with pytest.raises(type(failure)) as caught:
        write_checkpoint(tmp_path / "out", stream(), specs_of(tensors), no_sidecars, 100)
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_the_sidecars_leaves_nothing(tensors, tmp_path):
    def sidecars(folder):
        (folder / "config.json").write_text("{")
        raise RuntimeError("boom")

    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="boom"):
        write_checkpoint(tmp_path / "out", tensors.items(), specs_of(tensors), sidecars)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "Free some space or choose another folder."),
        (errno.EDQUOT, "Free some of your quota or choose another folder."),
        (errno.EIO, "Choose a folder that can be written to."),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_disk_that_fails_midway_is_one_sentence(
    tensors, tmp_path, monkeypatch, code, advice, call
):
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "out", tensors, shard_bytes=100)
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: cannot be written ({os.strerror(code)}); nothing was kept. {advice}"
    )
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tensors, tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: real(fd, data[:7], start))
    folder = write(tmp_path / "out", tensors)
    assert all(same_bits(open_checkpoint(folder).read(name), tensors[name]) for name in tensors)


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    spec = TensorSpec("w", (2**30,), torch.float32)
    with pytest.raises(CheckpointError, match=r"out: needs 4.00 GiB, 1.00 GiB free. Free some"):
        write_checkpoint(tmp_path / "out", [], [spec], no_sidecars)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tensors, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"file/out: cannot be written \(.*\); nothing was kept"
    ):
        write(tmp_path / "file" / "out", tensors)


def test_an_existing_target_is_kept(tensors, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(CheckpointError, match=f"{name}: exists and is not an empty folder"):
            write(tmp_path / name, tensors)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    assert list(contents(write(tmp_path / "empty", tensors))) == ["model.safetensors"]


def test_a_target_that_fills_meanwhile_is_kept(tensors, tmp_path):
    def sidecars(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(CheckpointError, match="Another process wrote there; choose another folder"):
        write_checkpoint(tmp_path / "out", tensors.items(), specs_of(tensors), sidecars)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_leftovers_of_dead_processes_of_this_host_are_removed(tensors, tmp_path):
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host = socket.gethostname()
    keep = [
        str(dead),
        f".out.partial-{host}-{dead}.old",
        f".out.partial-{host}-1",
        f".out.partial-elsewhere-{dead}",
        f".other.partial-{host}-{dead}",
    ]
    remove = [f".out.partial-{host}-{dead}", f".out.partial-{host}-{os.getpid()}"]
    for name in (*keep, *remove):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    write(tmp_path / "out", tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, "out"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda rows: rows[:-1], r"1 tensors never came, first lm_head.weight"),
        (
            lambda rows: [*rows, rows[0]],
            r"model.embed_tokens.weight came twice, or was not announced",
        ),
        (lambda rows: [*rows, ("x", torch.ones(1))], r"x came twice, or was not announced"),
        (lambda rows: [("lm_head.weight", torch.ones(2)), *rows], r"lm_head.weight came as \(2,\)"),
    ],
)
def test_tensors_that_were_not_announced_so_are_refused(tensors, tmp_path, change, what):
    with pytest.raises(CheckpointError, match=what):
        write_checkpoint(
            tmp_path / "out", change([*tensors.items()]), specs_of(tensors), no_sidecars
        )
    assert list(tmp_path.iterdir()) == []
