"""Arenas hold the same bits as the files, and a live model in one computes what it did before."""

import pytest
import torch

from evomerge.checkpoints.aligned import PADDING, AlignedSource, Rows
from evomerge.checkpoints.arena import (
    ALIGNMENT,
    ArenaSource,
    adopt,
    allocate,
    fill,
    lay_out,
    layout_for,
    load_arena,
)
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import MemorySource
from evomerge.errors import CheckpointError
from evomerge.merging.places import live_views
from tests.checkpoints.conftest import same_bits, save
from tests.families import make_family

TOGETHER = ("llama", "llama_tied", "gpt2", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3")


def checkpoint(folder, tensors, shards=2):
    names = list(tensors)
    return open_checkpoint(
        save(folder, [{n: tensors[n] for n in names[i::shards]} for i in range(shards)])
    )


def loaded_through(staging_bytes, source, layout):
    arena = allocate(layout)
    fill(arena, source, staging_bytes)
    return ArenaSource(arena, source)


def same_as(source, loaded):
    assert loaded.names() == source.names()
    assert all(same_bits(loaded.read(name), source.read(name)) for name in source.names())


def test_every_tensor_has_room_of_its_own(tensors):
    layout = layout_for(MemorySource(tensors), "cpu")
    assert list(layout.places) == sorted(tensors)
    ends = {}
    for name, place in layout.places.items():
        assert place.start % ALIGNMENT == 0
        assert place.start >= ends.get(place.buffer, 0), f"{name} overlaps the tensor before"
        ends[place.buffer] = place.start + place.num_elements
        assert (place.shape, place.buffer.dtype) == (tensors[name].shape, tensors[name].dtype)
    assert all(ends[key] <= size for key, size in layout.sizes.items())
    used = sum(tensor.nbytes for tensor in tensors.values())
    assert layout.num_bytes * (1 - layout.padding_share) == pytest.approx(used)


def test_offsets_beyond_32_bits_and_a_model_of_7_billion():
    specs = [TensorSpec(f"layers.{i}.up", (14336, 4096), torch.bfloat16) for i in range(123)]
    layout = lay_out([*reversed(specs), TensorSpec("norm", (4096,), torch.bfloat16)], "cpu")
    (size,) = layout.sizes.values()
    assert size == 123 * 14336 * 4096 + 4096 > 2**32
    assert layout.padding_share == 0
    assert layout.places["norm"].start == size - 4096
    assert layout == lay_out([TensorSpec("norm", (4096,), torch.bfloat16), *specs], "cpu")


@pytest.mark.parametrize("staging_bytes", [None, 16, 1000])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_arrive_bit_by_bit(tmp_path, tensors, shards, staging_bytes):
    source = checkpoint(tmp_path, tensors, shards)
    layout = layout_for(source, "cpu")
    loaded = loaded_through(staging_bytes, source, layout)
    same_as(source, loaded)
    for name, place in layout.places.items():
        if place.num_elements:
            buffer = loaded.arena.buffers[place.buffer]
            begins = buffer.data_ptr() + place.start * buffer.itemsize
            assert loaded.read(name).data_ptr() == begins, "not a view of the arena"


def test_more_tensors_than_one_call_takes(tmp_path):
    tensors = {f"layers.{i}.bias": torch.full((3,), float(i)) for i in range(2500)}
    source = checkpoint(tmp_path, tensors, 1)
    same_as(source, load_arena(source, layout_for(source, "cpu")))


def test_reads_that_stop_short_go_on(tmp_path, tensors, monkeypatch):
    import os

    preadv = os.preadv
    source = checkpoint(tmp_path, tensors, 1)
    monkeypatch.setattr(os, "preadv", lambda f, parts, at: preadv(f, [parts[0][:13]], at))
    same_as(source, load_arena(source, layout_for(source, "cpu")))


def test_other_sources_are_copied(tmp_path, tensors):
    held = MemorySource(tensors, "held", {"tied": "lm_head.weight"})
    loaded = load_arena(held, layout_for(held, "cpu"))
    same_as(held, loaded)
    assert (loaded.label, loaded.tied) == ("held", {"tied": "lm_head.weight"})
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    pickled = open_checkpoint(tmp_path)
    same_as(pickled, load_arena(pickled, layout_for(pickled, "cpu")))


def test_aligned_vocabularies_are_copied_and_keep_their_merged_dtype():
    models = [
        MemorySource({"embed": torch.arange(6.0).reshape(3, 2).to(dtype), "norm": torch.ones(2)})
        for dtype in (torch.bfloat16, torch.float16)
    ]
    own = torch.tensor([[2, 0, -1, -1], [1, -1, 0, -1]])
    rows = Rows(own, torch.tensor([0, 0, 1, PADDING]), torch.tensor([2, 0, 0, 0]))
    source = AlignedSource(models, 0, rows, ["embed"])
    loaded = load_arena(source, layout_for(source, "cpu"))
    same_as(source, loaded)
    assert loaded.dtype("embed") == torch.float32
    assert loaded.merged_dtype("embed") == torch.bfloat16


def test_models_over_two_devices(tmp_path, tensors):
    # to torch these are two devices, and both are this machine's memory
    devices = {name: "cpu" if i % 2 else "cpu:0" for i, name in enumerate(sorted(tensors))}
    source = checkpoint(tmp_path, tensors)
    layout = layout_for(source, devices)
    for staging_bytes in (None, 64):
        same_as(source, loaded_through(staging_bytes, source, layout))
    for name, place in layout.places.items():
        assert place.buffer.device == torch.device(devices[name])
    for device in ("cpu", "cpu:0"):
        own = [
            TensorSpec(n, source.shape(n), source.dtype(n))
            for n, d in devices.items()
            if d == device
        ]
        alone = lay_out(own, device)
        assert alone.places.items() <= layout.places.items()
        assert alone.sizes.items() <= layout.sizes.items()


def test_files_that_changed_since_they_were_opened(tmp_path):
    tensors = {"a": torch.ones(100), "b": torch.ones(50)}
    source = checkpoint(tmp_path, tensors, 1)
    layout = layout_for(source, "cpu")
    save(tmp_path, [{"a": torch.ones(50), "b": torch.ones(100)}])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        load_arena(source, layout)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="9 bytes short of its header"):
        load_arena(source, layout)
    path.unlink()
    with pytest.raises(CheckpointError, match="holds no model"):
        load_arena(source, layout)


@pytest.mark.parametrize("staging_bytes", [None, 64])
def test_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch, staging_bytes):
    import os

    source = checkpoint(tmp_path, {"a": torch.ones(100), "b": torch.ones(50)}, 1)
    preadv, path = os.preadv, tmp_path / "model.safetensors"
    calls = []

    def cut(descriptor, parts, start):
        if calls:
            os.truncate(path, start)
        calls.append(start)
        return preadv(descriptor, [parts[0][:64]], start)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(CheckpointError, match="bytes shorter while it was read"):
        loaded_through(staging_bytes, source, layout_for(source, "cpu"))


def test_another_model_than_the_layouts():
    one, other = MemorySource({"a": torch.ones(3)}, "one"), MemorySource({"b": torch.ones(3)}, "x")
    wide = MemorySource({"a": torch.ones(3, dtype=torch.float64)}, "wide")
    with pytest.raises(CheckpointError, match="x: has other tensors than the arena"):
        load_arena(other, layout_for(one, "cpu"))
    with pytest.raises(CheckpointError, match=r"wide: a is \(3,\) torch.float64, the arena"):
        load_arena(wide, layout_for(one, "cpu"))


def stored_names(model):
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, model.state_dict())
    return [name for name in stored if name not in model.all_tied_weights_keys]


@pytest.mark.parametrize("label", TOGETHER)
def test_adopted_model_is_the_same_model(label, tmp_path):
    model = make_family(label, 1, tmp_path / "before", torch.bfloat16)
    tokens = torch.arange(3, 11)[None]
    names = stored_names(model)
    before = model(tokens).logits
    arena = adopt(model, live_views(model, names))
    assert torch.equal(model(tokens).logits, before)
    for name in arena.layout.places:
        view = live_views(model, names)[name]
        assert view.data_ptr() == arena.view(name).data_ptr()
    fused = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    adopted = sum(place.num_elements for place in arena.layout.places.values())
    assert adopted >= sum(p.numel() for p in model.parameters()) - fused
    model.save_pretrained(tmp_path / "after")
    one, other = (open_checkpoint(tmp_path / folder) for folder in ("before", "after"))
    same_as(one, other)
    # what is written to the arena is the model
    for buffer in arena.buffers.values():
        buffer.zero_()
    assert not any(parameter.any() for parameter in model.parameters() if parameter.dim() == 2)


def test_tied_parameters_stay_tied():
    model = make_family("llama_tied", 0)
    arena = adopt(model, live_views(model, stored_names(model)))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding is head
    assert "model.embed_tokens.weight" in arena.layout.places
    assert embedding.data_ptr() == arena.view("model.embed_tokens.weight").data_ptr()


class Odd(torch.nn.Module):
    """One memory under two parameters and a buffer; a transposed, a wide and an unknown tensor."""

    def __init__(self):
        super().__init__()
        memory = torch.arange(12.0).reshape(3, 4)
        self.one = torch.nn.Parameter(memory)
        self.other = torch.nn.Parameter(memory)
        self.register_buffer("seen", memory)
        self.turned = torch.nn.Parameter(torch.ones(4, 3).bfloat16().t())
        self.wide = torch.nn.Parameter(torch.ones(5))
        self.unknown = torch.nn.Parameter(torch.ones(5))
        plain = torch.ones(2, 3)
        self.straight = torch.nn.Parameter(plain)
        self.crossed = torch.nn.Parameter(plain.t())
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_only_what_can_move_moves():
    model = Odd()
    state = model.state_dict()
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    values = {name: tensor.clone() for name, tensor in state.items()}
    scratch = model.scratch.data_ptr()
    known = {name: tensor for name, tensor in state.items() if name != "unknown"}
    arena = adopt(model, known)
    assert sorted(arena.layout.places) == ["one", "wide"]
    moved = {n for n, t in model.state_dict().items() if t.data_ptr() != places[n]}
    assert moved == {"one", "other", "seen", "wide"}
    assert model.scratch.data_ptr() == scratch
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    arena.view("one").fill_(7.0)
    assert all((t == 7.0).all() for t in (model.one, model.other, model.seen))


def test_adopted_twice_is_adopted():
    model = make_family("llama", 0)
    names = stored_names(model)
    adopt(model, live_views(model, names))
    values = {name: view.clone() for name, view in live_views(model, names).items()}
    again = adopt(model, live_views(model, names), "cpu")
    assert all(torch.equal(again.view(name), value) for name, value in values.items())


def test_sources_and_live_model_have_one_layout(tmp_path):
    model = make_family("qwen2", 0, tmp_path)
    source = open_checkpoint(tmp_path)
    live = adopt(model, live_views(model, source.names()))
    assert live.layout == layout_for(source, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("staging_bytes", [None, 1000])
def test_to_a_gpu(tmp_path, tensors, staging_bytes):
    source = checkpoint(tmp_path, tensors)
    loaded = loaded_through(staging_bytes, source, layout_for(source, "cuda"))
    assert all(buffer.is_cuda for buffer in loaded.arena.buffers.values())
    assert all(same_bits(loaded.read(name).cpu(), source.read(name)) for name in source.names())
    same_as(source, load_arena(source, layout_for(source, "cpu"), pinned=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_the_cpu_is_adopted_on_a_gpu():
    tokens = torch.arange(3, 11)[None].cuda()
    model = make_family("llama", 1)
    names = stored_names(model)
    arena = adopt(model, live_views(model, names), "cuda")
    wanted = make_family("llama", 1).cuda()(tokens).logits
    assert torch.equal(model.cuda()(tokens).logits, wanted)
    assert live_views(model, names)[names[0]].data_ptr() == arena.view(names[0]).data_ptr()
