"""LazyCheckpoint against safetensors' own reader, and tied heads against transformers."""

import json
import multiprocessing
import os
import pickle
import struct
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints.reader import LazyCheckpoint, StreamedCheckpoint, open_checkpoint
from evomerge.errors import CheckpointError
from tests.checkpoints.conftest import CONFIG, llama, random_bits, same_bits, save

TIED = CONFIG.replace("false", "true")
SILENT = '{"model_type": "gpt2"}'
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def split(tensors, *cuts):
    names = list(tensors)
    edges = [0, *cuts, len(names)]
    return [{name: tensors[name] for name in names[a:b]} for a, b in pairwise(edges)]


def test_every_dtype_is_read_bit_by_bit_as_safetensors_reads_it(tensors, tmp_path):
    source = open_checkpoint(save(tmp_path, [tensors]))
    theirs = load_file(tmp_path / "model.safetensors")
    assert source.names() == tuple(sorted(theirs))
    for name, tensor in theirs.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert same_bits(source.read(name), tensor)
        assert source.read(name).is_contiguous()
    assert source.total_bytes == sum(tensor.nbytes for tensor in theirs.values())


@pytest.mark.parametrize("cuts", [(1,), (3,), (2, 4, 6), (1, 2, 3, 4, 5, 6, 7)])
def test_the_shards_do_not_show(tensors, tmp_path, cuts):
    whole = open_checkpoint(save(tmp_path / "whole", [tensors]))
    parts = open_checkpoint(save(tmp_path / "parts", split(tensors, *cuts)))
    assert parts.names() == whole.names()
    assert all(same_bits(parts.read(name), whole.read(name)) for name in whole.names())


def test_tensors_that_are_not_aligned_are_read_right(tmp_path):
    # headers written before safetensors 0.3 were not padded, and mixed dtypes leave odd offsets
    values = {"a": random_bits((3,), torch.int8, 0), "b": random_bits((5,), torch.float32, 1)}
    header = {
        "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
    }
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    data = b"".join(value.view(torch.uint8).numpy().tobytes() for value in values.values())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    source = open_checkpoint(tmp_path)
    for name, value in values.items():
        assert same_bits(source.read(name), value)
        assert same_bits(source.read(name) + 0, value + 0)


def test_a_tensor_larger_than_memory_is_opened_and_looked_at(tmp_path):
    size = 2**38  # a hole in the file, so that it takes no room on the disk either
    header = {"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")
    tensor = open_checkpoint(tmp_path).read("w")
    assert (tensor[0].item(), tensor[size // 4].item(), tensor[-1].item()) == (0.0, 0.0, 1.0)


def read_in_child(source, queue):
    queue.put(
        {name: bytes(source.read(name).reshape(-1).view(torch.uint8)) for name in source.names()}
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same(tensors, tmp_path, method):
    source = open_checkpoint(save(tmp_path, split(tensors, 4)), "org/a")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(source, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    assert found == {
        name: bytes(tensor.reshape(-1).view(torch.uint8)) for name, tensor in tensors.items()
    }


def test_a_pickled_source_opens_the_files_again(tensors, tmp_path):
    source = open_checkpoint(save(tmp_path, [tensors]), "org/a")
    text = pickle.dumps(source)
    assert len(text) < 1000
    copy = pickle.loads(text)
    assert isinstance(copy, LazyCheckpoint)
    assert (copy.label, copy.names()) == ("org/a", source.names())


def test_main_dtype_is_that_of_most_elements(tmp_path):
    tensors = {
        "a": torch.zeros(10, dtype=torch.float32),
        "b": torch.zeros(6, dtype=torch.bfloat16),
        "c": torch.zeros(5, dtype=torch.bfloat16),
        "d": torch.zeros(99, dtype=torch.int64),
    }
    assert open_checkpoint(save(tmp_path, [tensors])).main_dtype == torch.bfloat16
    only = open_checkpoint(save(tmp_path / "ids", [{"d": tensors["d"]}]), "org/a")
    with pytest.raises(CheckpointError, match="org/a: holds no floating-point tensor"):
        _ = only.main_dtype


def test_opening_warns_of_nothing(tensors, tmp_path):
    folder = save(tmp_path, [tensors])
    torch.set_warn_always(True)  # else torch says it once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            open_checkpoint(folder)
    finally:
        torch.set_warn_always(False)


def test_messages_name_the_model_and_the_folder(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path, "org/a")
    assert str(caught.value).startswith(f"org/a ({tmp_path}): holds no model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: holds no model.safetensors")


# read into memory of its own


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 3, 4, 5, 6, 7)])
def test_streamed_tensors_are_the_mapped_ones(tensors, tmp_path, cuts):
    folder = save(tmp_path, split(tensors, *cuts))
    mapped, streamed = open_checkpoint(folder), open_checkpoint(folder, mapped=False)
    assert isinstance(streamed, StreamedCheckpoint)
    assert streamed.names() == mapped.names()
    assert (streamed.total_bytes, streamed.main_dtype) == (mapped.total_bytes, mapped.main_dtype)
    for name in mapped.names():
        kind = (streamed.shape(name), streamed.dtype(name))
        assert kind == (mapped.shape(name), mapped.dtype(name))
        assert same_bits(streamed.read(name), mapped.read(name))
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.norm\.wight'\. Did you mean"):
        streamed.read("model.norm.wight")


def test_what_is_streamed_is_the_callers_own(tensors, tmp_path):
    path = save(tmp_path, [tensors]) / "model.safetensors"
    before = path.read_bytes()
    source = open_checkpoint(tmp_path, mapped=False)
    first = source.read(EMBED)
    first.zero_()
    assert same_bits(source.read(EMBED), tensors[EMBED])
    assert path.read_bytes() == before


def test_streaming_leaves_no_file_open_and_no_map(tensors, tmp_path):
    source = open_checkpoint(save(tmp_path, [tensors]), mapped=False)
    held = [source.read(name) for name in source.names()]
    maps = Path("/proc/self/maps").read_text()
    files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert len(held) == len(tensors)
    assert str(tmp_path) not in maps + "\n".join(files)


def test_a_streamed_source_that_is_pickled_streams_again(tensors, tmp_path):
    source = open_checkpoint(save(tmp_path, [tensors]), "org/a", mapped=False)
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy, StreamedCheckpoint)
    assert (copy.label, copy.names()) == ("org/a", source.names())


def test_short_reads_are_continued(tensors, tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: real(fd, [parts[0][:7]], at))
    source = open_checkpoint(save(tmp_path, [tensors]), mapped=False)
    assert all(same_bits(source.read(name), tensors[name]) for name in tensors)


def test_a_file_that_shrinks_or_goes_away_meanwhile_is_named(tensors, tmp_path):
    path = save(tmp_path, [tensors]) / "model.safetensors"
    source = open_checkpoint(tmp_path, "org/a", mapped=False)
    os.truncate(path, path.stat().st_size - 1)
    last = max(source.names(), key=lambda name: source._entries[name].start)
    with pytest.raises(CheckpointError, match=r"org/a: model.safetensors has become 1 bytes short"):
        source.read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"org/a: model.safetensors cannot be read \(No such"):
        source.read(last)


def test_heads_are_tied_alike_however_they_are_read(tensors, tmp_path):
    tensors[HEAD] = tensors[EMBED].clone()
    assert open_checkpoint(save(tmp_path, [tensors], TIED), mapped=False).tied == {HEAD: EMBED}
    tensors[HEAD].view(torch.int16)[3, 2] ^= 1
    source = open_checkpoint(save(tmp_path, [tensors], TIED), mapped=False)
    assert source.tied == {}
    assert same_bits(source.read(HEAD), tensors[HEAD])


# pickles


def test_a_pickle_is_mapped_where_streaming_is_asked_for(tensors, tmp_path):
    source = open_checkpoint(save_bin(tmp_path, tensors), mapped=False)
    assert type(source) is LazyCheckpoint
    assert all(same_bits(source.read(name), tensors[name]) for name in tensors)


def save_bin(folder, tensors, config=CONFIG, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    return folder


def test_a_pickle_reads_as_safetensors_do(tensors, tmp_path):
    tensors["model.layers.1.up.weight"] = tensors["model.layers.1.up.weight"].T
    source = open_checkpoint(save_bin(tmp_path, tensors))
    assert source.names() == tuple(sorted(tensors))
    assert all(same_bits(source.read(name), tensors[name]) for name in tensors)
    assert all(source.read(name).is_contiguous() for name in tensors)


def test_pickled_shards_are_checked_as_others(tmp_path):
    for number, name in enumerate("ab", 1):
        torch.save({name: torch.ones(number)}, tmp_path / f"pytorch_model-{number}.bin")
    listed = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    assert open_checkpoint(tmp_path).read("b").tolist() == [1.0, 1.0]
    index.write_text(json.dumps({"weight_map": listed | {"c": "pytorch_model-2.bin"}}))
    with pytest.raises(CheckpointError, match=r"puts c into pytorch_model-2.bin"):
        open_checkpoint(tmp_path)


class Payload:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capfd):
    save_bin(tmp_path, {"a": torch.zeros(1), "b": Payload()})
    with pytest.raises(CheckpointError, match="is a pickle that holds more than tensors"):
        open_checkpoint(tmp_path, "org/a")
    assert "must not run" not in "".join(capfd.readouterr())


def test_pickles_of_another_kind_are_named(tmp_path):
    cases = [
        ({"step": 3}, "step in pytorch_model.bin is int, not a tensor"),
        ([torch.zeros(1)], "holds list, not named tensors"),
        (
            {"w": torch.zeros(1, dtype=torch.float8_e4m3fn)},
            "w in pytorch_model.bin is torch.float8",
        ),
    ]
    for held, what in cases:
        with pytest.raises(CheckpointError, match=what):
            open_checkpoint(save_bin(tmp_path, held))
    save_bin(tmp_path, {"a": torch.zeros(1)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not in PyTorch's format since version 1.6"):
        open_checkpoint(tmp_path)


def test_a_truncated_pickle_is_named(tmp_path):
    path = save_bin(tmp_path, {"a": torch.zeros(1000)}) / "pytorch_model.bin"
    data = path.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"org/a.*pytorch_model.bin is truncated, or not"):
            open_checkpoint(tmp_path, "org/a")


# tied heads


def test_an_equal_head_of_a_tied_model_is_not_listed(tensors, tmp_path):
    tensors[HEAD] = tensors[EMBED].clone()
    source = open_checkpoint(save(tmp_path, [tensors], TIED))
    assert HEAD not in source
    assert HEAD not in source.names()
    assert source.tied == {HEAD: EMBED}
    without = open_checkpoint(save(tmp_path / "b", split(tensors, 7)[:1], TIED))
    assert without.names() == source.names()
    assert without.tied == source.tied
    assert without.total_bytes == source.total_bytes


def test_an_equal_head_is_listed_unless_the_config_ties_it(tensors, tmp_path):
    tensors[HEAD] = tensors[EMBED].clone()
    for name, config in {"untied": CONFIG, "silent": SILENT}.items():
        source = open_checkpoint(save(tmp_path / name, [tensors], config))
        assert HEAD in source.names()
        assert source.tied == {}


def test_a_head_that_differs_in_one_bit_is_listed(tensors, tmp_path):
    tensors[HEAD] = tensors[EMBED].clone()
    tensors[HEAD].view(torch.int16)[3, 2] ^= 1
    source = open_checkpoint(save(tmp_path, [tensors], TIED))
    assert same_bits(source.read(HEAD), tensors[HEAD])
    assert source.tied == {}


def test_shared_memory_in_a_pickle_ties_unless_the_config_denies_it(tensors, tmp_path):
    tensors[HEAD] = tensors[EMBED]
    for config, tied in {SILENT: {HEAD: EMBED}, TIED: {HEAD: EMBED}, CONFIG: {}}.items():
        assert open_checkpoint(save_bin(tmp_path, tensors, config)).tied == tied


def test_the_text_config_of_a_model_with_several_towers_counts(tensors, tmp_path):
    del tensors[HEAD]
    config = '{"text_config": {"tie_word_embeddings": true}}'
    assert open_checkpoint(save(tmp_path, [tensors], config)).tied == {HEAD: EMBED}


def test_heads_are_treated_as_transformers_loads_them(tmp_path):
    """The head that transformers computes with is the one that is listed, or the embedding."""
    from transformers import LlamaForCausalLM

    weights = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    equal = weights | {HEAD: weights[EMBED].clone()}
    absent = {name: tensor for name, tensor in weights.items() if name != HEAD}
    settings = llama(tie_word_embeddings=True).config
    for name, stored in {"differs": weights, "equal": equal, "absent": absent}.items():
        settings.save_pretrained(tmp_path / name)
        config = (tmp_path / name / "config.json").read_text()
        source = open_checkpoint(save(tmp_path / name, [stored], config))
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        ours = source.read(source.tied.get(HEAD, HEAD))
        assert same_bits(loaded.lm_head.weight.detach(), ours), name
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (HEAD in source.tied)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(Is a directory\)"):
            open_checkpoint(tmp_path, "org/a")


def test_a_config_that_is_not_json_is_named(tensors, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        open_checkpoint(save(tmp_path, [tensors], "{"), "org/a")
