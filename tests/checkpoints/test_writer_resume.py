"""An interrupted checkpoint is gone on with shard by shard, and only with shards that are good."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch

from evomerge.checkpoints.partial import JOURNAL, partial_path
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.checksums import checksum_of
from evomerge.errors import CheckpointError
from tests.checkpoints.conftest import random_bits

SHARD_BYTES = 100
TENSORS = {f"w{i}": random_bits((12,), torch.float32, i) for i in range(6)}  # two in each shard
SPECS = [TensorSpec(name, (12,), torch.float32) for name in TENSORS]
FILES = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def writer(out, identity="the merge", shard_bytes=SHARD_BYTES):
    return CheckpointWriter(out, SPECS, shard_bytes, identity)


def complete(out, **options):
    """Write what is missing; return the names that were, and the shards that were kept."""
    with writer(out, **options) as held:
        missing = list(held.missing)
        for name in missing:
            held.write(name, TENSORS[name])
        assert held.checksums == {name: checksum_of(t) for name, t in TENSORS.items()}
        held.finish(lambda folder: (folder / "config.json").write_text("{}"))
    return missing, held.resumed


def write_and_raise(held, names, error):
    with held:
        for name in names:
            held.write(name, TENSORS[name])
        raise error


def stop(out, after, error=KeyboardInterrupt, **options):
    """Write some tensors, then be interrupted; return the hidden folder."""
    held = writer(out, **options)
    with pytest.raises(error):
        write_and_raise(held, list(TENSORS)[:after], error)
    return held.path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """What an uninterrupted writer leaves."""
    complete(tmp_path / "whole")
    held = contents(tmp_path / "whole")
    assert sorted(held) == ["config.json", *FILES, "model.safetensors.index.json"]
    return held


@pytest.mark.parametrize("after", [2, 3, 4, 5, 6])
def test_finished_shards_are_kept_and_the_files_are_the_same(tmp_path, whole, after):
    partial = stop(tmp_path / "out", after)
    inodes = {path.name: path.stat().st_ino for path in partial.iterdir()}
    missing, resumed = complete(tmp_path / "out")
    assert resumed == tuple(FILES[: after // 2])
    assert missing == list(TENSORS)[after // 2 * 2 :]
    assert contents(tmp_path / "out") == whole
    for file in resumed:
        assert (tmp_path / "out" / file).stat().st_ino == inodes[file]
    assert not partial.exists()


def test_tensors_out_of_order_are_kept_by_shard_too(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(writer(tmp_path / "out"), ("w5", "w0", "w4"), KeyboardInterrupt)
    assert complete(tmp_path / "out") == (["w0", "w1", "w2", "w3"], (FILES[2],))
    assert contents(tmp_path / "out") == whole


def test_a_process_that_died_is_gone_on_from_twice(tmp_path, whole):
    for count, kept in ((2, ()), (4, tuple(FILES[:1]))):
        child = os.fork()
        if not child:
            held = writer(tmp_path / "out").__enter__()
            for name in list(held.missing)[: count - 2 * len(held.resumed)]:
                held.write(name, TENSORS[name])
            os._exit(0 if held.resumed == kept else 1)  # nothing is cleaned up
        assert os.waitpid(child, 0)[1] == 0
        assert partial_path(tmp_path / "out", child).exists()
    assert complete(tmp_path / "out")[1] == tuple(FILES[:2])
    assert contents(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_an_error_interrupts_is_removed(tmp_path):
    stop(tmp_path / "out", 4, error=RuntimeError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 1])
def test_nothing_is_kept_before_a_shard_is_finished(tmp_path, after):
    stop(tmp_path / "out", after)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"identity": "another merge"}, {"shard_bytes": 150}])
def test_another_merge_or_layout_reuses_nothing(tmp_path, change):
    partial = stop(tmp_path / "out", 4)
    assert complete(tmp_path / "out", **change) == (list(TENSORS), ())
    assert not partial.exists()


def test_a_writer_without_identity_neither_keeps_nor_reuses(tmp_path):
    stop(tmp_path / "out", 4, identity=None)
    assert list(tmp_path.iterdir()) == []
    stop(tmp_path / "out", 4)
    assert complete(tmp_path / "out", identity=None) == (list(TENSORS), ())


def test_the_hidden_folder_of_a_living_process_is_left_alone(tmp_path):
    partial = stop(tmp_path / "out", 4)
    theirs = partial_path(tmp_path / "out", os.getppid())
    partial.rename(theirs)
    before = contents(theirs)
    assert complete(tmp_path / "out") == (list(TENSORS), ())
    assert contents(theirs) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def change_header(path):
    path.write_bytes(path.read_bytes().replace(b"w0", b"v0"))


@pytest.mark.parametrize("damage", [flip, cut, change_header, os.unlink])
def test_a_damaged_shard_is_written_anew(tmp_path, whole, damage):
    partial = stop(tmp_path / "out", 4)
    damage(partial / FILES[0])
    assert complete(tmp_path / "out") == (["w0", "w1", "w4", "w5"], (FILES[1],))
    assert contents(tmp_path / "out") == whole


def test_a_journal_that_ends_within_a_line_counts_up_to_there(tmp_path, whole):
    partial = stop(tmp_path / "out", 4)
    os.truncate(partial / JOURNAL, (partial / JOURNAL).stat().st_size - 5)
    assert complete(tmp_path / "out") == (["w2", "w3", "w4", "w5"], (FILES[0],))
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": 3}', "\x00\n\x00", '{"a": 1}\n{}'])
def test_a_journal_of_something_else_is_not_believed(tmp_path, whole, text):
    partial = stop(tmp_path / "out", 4)
    (partial / JOURNAL).write_text(text)
    assert complete(tmp_path / "out") == (list(TENSORS), ())
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("line", ["7", "{}", '{"file": "x", "checksums": {"w0": 3}}', "[1]"])
def test_a_line_of_something_else_is_not_believed(tmp_path, whole, line):
    partial = stop(tmp_path / "out", 4)
    with (partial / JOURNAL).open("a") as file:
        file.write(line + "\n")
    assert complete(tmp_path / "out")[1] == tuple(FILES[:2])
    assert contents(tmp_path / "out") == whole


def test_a_journal_cannot_vouch_for_other_tensors(tmp_path, whole):
    partial = stop(tmp_path / "out", 2)
    lines = (partial / JOURNAL).read_text().splitlines()
    entry = json.loads(lines[1])
    del entry["checksums"]["w1"]
    (partial / JOURNAL).write_text(f"{lines[0]}\n{json.dumps(entry)}\n")
    assert complete(tmp_path / "out") == (list(TENSORS), ())
    assert contents(tmp_path / "out") == whole


def test_half_written_sidecars_of_the_dead_are_removed(tmp_path, whole):
    partial = stop(tmp_path / "out", 6)
    (partial / "config.json").write_text("{half")
    (partial / "templates").mkdir()
    (partial / "templates" / "chat.jinja").write_text("half")
    complete(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_the_room_that_is_needed_is_that_of_what_is_missing(tmp_path, monkeypatch):
    partial = stop(tmp_path / "out", 4)
    needed = (partial / FILES[2]).stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(CheckpointError, match=r"out: needs 0.00 GiB, 0.00 GiB free. Free some"):
        complete(tmp_path / "out")
    assert (partial / FILES[0]).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    assert complete(tmp_path / "out")[1] == tuple(FILES[:2])


def test_the_best_of_several_leftovers_is_gone_on_with(tmp_path, whole):
    first = stop(tmp_path / "out", 2)
    first.rename(tmp_path / "aside")
    stop(tmp_path / "out", 4)
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    (tmp_path / "aside").rename(partial_path(tmp_path / "out", dead))
    assert complete(tmp_path / "out")[1] == tuple(FILES[:2])
    assert contents(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
