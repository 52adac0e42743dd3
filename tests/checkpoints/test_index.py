"""Headers and index files: read as safetensors reads them where right, named where wrong."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from evomerge.checkpoints.index import find_files, index_tensors, read_header
from evomerge.errors import CheckpointError
from tests.checkpoints import conftest


def write(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    path.write_bytes(prefix + text + data)
    return path


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


def test_entries_are_those_that_safetensors_sees(tensors, tmp_path):
    folder = conftest.save(tmp_path, [tensors])
    entries = read_header(folder / "model.safetensors", "a")
    data = (folder / "model.safetensors").read_bytes()
    with safe_open(folder / "model.safetensors", "pt") as theirs:
        assert sorted(entries) == sorted(theirs.keys())
        for name, found in entries.items():
            tensor = theirs.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
            raw = data[found.start : found.start + found.num_bytes]
            assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_truncation_is_reported_with_the_bytes_that_are_missing(tensors, tmp_path):
    data = save(tensors)
    (header_length,) = struct.unpack("<Q", data[:8])
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        # before the header is whole, all that is known is where the header should end
        target = 8 if size < 8 else 8 + header_length if size < 8 + header_length else len(data)
        with pytest.raises(CheckpointError) as caught:
            read_header(path, "org/a")
        short = f"org/a: model.safetensors is {target - size} bytes short of its header. "
        assert str(caught.value) == short + "Download it again."


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_corrupt_header_is_refused_or_stays_within_the_file(tmp_path_factory, data):
    whole = bytearray(save({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}))
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "corrupt.safetensors"
    path.write_bytes(whole)
    try:
        entries = read_header(path, "org/a")
    except CheckpointError:
        return
    for found in entries.values():
        assert 8 <= found.start <= found.start + found.num_bytes <= len(whole)


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        (b"{", b"", "has a header that is not JSON"),
        (b"\xff\xfe", b"", "has a header that is not JSON"),
        (b"[" * 100_000, b"", "has a header that is not JSON"),
        (b"[]", b"", "has a header that is not a JSON object"),
        ({"a": 1}, b"", "has a malformed header entry for a"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"1", "has a malformed header entry for a"),
        ({"a": entry(0, 1, shape=[-1])}, b"1", "has a malformed header entry for a"),
        ({"a": entry(0, 1, shape=[1.0])}, b"1", "has a malformed header entry for a"),
        ({"a": entry(0, 1, shape="1")}, b"1", "has a malformed header entry for a"),
        ({"a": entry(0, 1, shape=[2])}, b"1", "gives a 1 bytes, but U8 of shape (2,)"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "has a and b overlap"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "has a and b overlap"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"1234", "has a hole before b"),
        ({"a": entry(1, 2)}, b"12", "has a hole before a"),
        ({"a": entry(0, 2)}, b"1234", "has 2 bytes more than its header says"),
    ],
)
def test_malformed_headers_are_named(tmp_path, header, data, what):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path, "org/a")
    assert str(caught.value) == f"org/a: model.safetensors {what}. Download it again."


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "F64", "C64", "U16", ["U8"]])
def test_dtypes_that_cannot_be_merged_are_refused_by_name(tmp_path, dtype):
    path = write(tmp_path / "model.safetensors", {"w": entry(0, 2, dtype)}, b"12")
    with pytest.raises(CheckpointError) as caught:
        read_header(path, "org/a")
    assert str(caught.value).startswith(
        f"org/a: w in model.safetensors is {dtype}; evomerge merges"
    )


def test_a_file_that_is_something_else_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*Run git lfs pull"):
        read_header(path, "org/a")
    path.write_bytes(b"<!DOCTYPE html><html>" + b" " * 1000)
    with pytest.raises(CheckpointError, match="does not begin with a safetensors header"):
        read_header(path, "org/a")
    path.unlink()
    path.mkdir()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors cannot be read \(Is a directory\)"
    ):
        read_header(path, "org/a")


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    with pytest.raises(CheckpointError, match=r"\(it has nothing\)"):
        find_files(tmp_path, "org/a")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"^org/a: holds no .*\(it has adapter_model"):
        find_files(tmp_path, "org/a")


def test_files_are_preferred_in_the_order_of_transformers(tensors, tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert find_files(tmp_path, "a").pickled
    conftest.write_index(tmp_path, {"a": "x.safetensors"})
    (tmp_path / "x.safetensors").touch()
    assert [path.name for path in find_files(tmp_path, "a").paths] == ["x.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert [path.name for path in find_files(tmp_path, "a").paths] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "model.safetensors.index.json is not JSON"),
        ("[1]", "model.safetensors.index.json is not a JSON object"),
        ("{}", "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": {}}', "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "is not a file of this folder"),
        ('{"weight_map": {"a": 3}}', "puts a into 3, which is not a file of this folder"),
        ('{"weight_map": {"a": "b.safetensors"}}', "names b.safetensors, which is not there"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, text, what):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        find_files(tmp_path, "org/a")
    assert str(caught.value).startswith("org/a: ")
    assert what in str(caught.value)


def index(folder):
    return index_tensors(find_files(folder, "org/a"), "org/a")


def test_shards_and_index_must_agree(tmp_path):
    one, two = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    folder = conftest.save(tmp_path, [one, two])
    conftest.write_index(folder, {"a": first, "b": second, "c": second})
    with pytest.raises(
        CheckpointError, match=f"the index puts c into {second}, which does not hold it"
    ):
        index(folder)
    conftest.save(folder, [one, two | one])
    conftest.write_index(folder, {"a": first, "b": second})
    with pytest.raises(CheckpointError, match=f"a is both in {first} and in {second}"):
        index(folder)


def test_a_tensor_that_the_index_forgets_is_found_all_the_same(tmp_path):
    folder = conftest.save(
        tmp_path, [{"a": torch.zeros(1), "x": torch.ones(1)}, {"b": torch.zeros(1)}]
    )
    listed = find_files(folder, "org/a").listed
    conftest.write_index(folder, {name: listed[name] for name in ("a", "b")})
    assert sorted(index(folder)) == ["a", "b", "x"]
