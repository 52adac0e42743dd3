"""MemorySource and hold keep TensorSource's contract."""

import pytest
import torch

from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.source import MemorySource, hold
from evomerge.checksums import as_bytes
from evomerge.errors import CheckpointError
from tests.checkpoints.conftest import CONFIG, same_bits, save


def test_names_are_sorted_whatever_the_order_of_the_dict(tensors):
    backwards = dict(sorted(tensors.items(), reverse=True))
    assert (
        MemorySource(backwards).names() == tuple(sorted(tensors)) == MemorySource(tensors).names()
    )


def test_facts_are_those_of_the_tensors(tensors):
    source = MemorySource(tensors)
    for name, tensor in tensors.items():
        assert name in source
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert source.read(name) is tensor
    assert "model.layers.2.up.weight" not in source


def test_a_missing_tensor_is_named_with_the_model_and_the_nearest_name(tensors):
    source = MemorySource(tensors, label="org/a")
    for ask in (source.shape, source.dtype, source.read):
        with pytest.raises(
            CheckpointError, match=r"^org/a: has no tensor 'model.norm.wight'"
        ) as caught:
            ask("model.norm.wight")
        assert "Did you mean model.norm.weight?" in str(caught.value)


def test_held_tensors_survive_the_files(tensors, tmp_path):
    folder = save(tmp_path / "a", [tensors], CONFIG.replace("false", "true"))
    source = open_checkpoint(folder, "org/a")
    held = hold(source)
    mapped = {source.read(name).data_ptr() for name in tensors if source.read(name).numel()}
    assert mapped.isdisjoint(held.read(name).data_ptr() for name in tensors)
    assert (held.label, held.names(), held.tied) == ("org/a", source.names(), source.tied)
    assert all(same_bits(held.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_as_bytes_aliases_contiguous_tensors_and_reads_others_in_logical_order(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert as_bytes(tensor).data_ptr() == tensor.data_ptr()
    assert as_bytes(tensor.T).view(dtype).tolist() == tensor.T.flatten().tolist()
    assert as_bytes(tensor[0, 1]).view(dtype).tolist() == [tensor[0, 1].item()]
