"""Merging into a folder: memory that does not grow with the models, and what survives a kill."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from evomerge.checkpoints.index import STORED_DTYPES
from evomerge.checkpoints.partial import partial_path
from evomerge.config.mergekit import read_recipe
from evomerge.errors import NonFiniteError
from evomerge.merging.run import merge

MIB = 2**20
RECIPE = """
merge_method: {method}
base_model: ./base
models:
  - {{model: ./a, parameters: {{weight: 0.5}}}}
  - {{model: ./b, parameters: {{weight: 0.25}}}}
"""
CONFIG = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
NUM_TENSORS = 9
SHARD_BYTES = 700  # three tensors of 200 bytes each
FILES = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]

MEASURED = """
import sys
from pathlib import Path
from evomerge.config.mergekit import read_recipe
from evomerge.merging.run import merge

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

peaks = [peak_mib()]
for folder in map(Path, sys.argv[1:]):
    merge(read_recipe(folder / "recipe.yaml"), folder / "out")
    peaks.append(peak_mib())
print(*peaks)
"""


@pytest.fixture
def models(tmp_path):
    """A base and two parents of nine little tensors."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{i}.w": torch.randn(10, 5, generator=generator)
            for i in range(NUM_TENSORS)
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(CONFIG)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(method="ties"))
    return tmp_path


def merged(models, out, recipe="recipe.yaml"):
    """Merge; return what was told last and the files."""
    told = []
    merge(read_recipe(models / recipe), models / out, shard_bytes=SHARD_BYTES, notify=told.append)
    return told[-1], {path.name: path.read_bytes() for path in (models / out).iterdir()}


def kill_after(models, num_tensors, recipe="recipe.yaml"):
    """Merge in another process, which kills itself when so many tensors are written."""

    def kill(progress):
        if progress.num_done == num_tensors:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            merge(read_recipe(models / recipe), models / "out", shard_bytes=700, notify=kill)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (models / "out").exists()
    assert partial_path(models / "out", child).exists()


@pytest.mark.parametrize("after", [1, 3, 5, 8, 9])
def test_a_killed_merge_is_gone_on_with_and_the_files_are_the_same(models, after):
    told, whole = merged(models, "whole")
    assert (told.num_done, told.resumed) == (NUM_TENSORS, ())
    assert told.read_bytes == 3 * told.written_bytes == 3 * NUM_TENSORS * 200
    kill_after(models, after)
    told, files = merged(models, "out")
    # the tensor after the last one that was told of may have been written too
    assert told.resumed in (tuple(FILES[: after // 3]), tuple(FILES[: (after + 1) // 3]))
    assert told.num_done == NUM_TENSORS
    assert told.written_bytes == (NUM_TENSORS - 3 * len(told.resumed)) * 200
    assert told.read_bytes == 3 * told.written_bytes
    assert files == whole
    assert not [path for path in models.iterdir() if path.name.startswith(".out")]


def test_a_merge_that_is_stopped_keeps_what_is_finished(models):
    def stop(progress):
        if progress.num_done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(read_recipe(models / "recipe.yaml"), models / "out", shard_bytes=700, notify=stop)
    told, files = merged(models, "out")
    assert told.resumed in ((FILES[0],), tuple(FILES[:2]))
    assert files == merged(models, "whole")[1]


def touch_a_model(models):
    os.utime(models / "a" / "model.safetensors", (1, 1))


def change_the_recipe(models):
    (models / "recipe.yaml").write_text(RECIPE.format(method="ties").replace("0.25", "0.3"))


def change_a_tokenizer(models):
    (models / "b" / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("change", [touch_a_model, change_the_recipe, change_a_tokenizer])
def test_another_merge_starts_anew(models, change):
    kill_after(models, 8)
    change(models)
    told, files = merged(models, "out")
    assert told.resumed == ()
    assert files == merged(models, "whole")[1]


def test_an_error_leaves_nothing(models):
    tensors = {f"model.layers.{i}.w": torch.ones(10, 5) for i in range(NUM_TENSORS)}
    tensors["model.layers.8.w"][3, 2] = torch.nan
    save_file(tensors, models / "a" / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"layers\.8\.w: .*/a holds NaN"):
        merged(models, "out")
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base", "recipe.yaml"]
    assert not partial_path(models / "out", os.getpid()).exists()


def make_holes(folder, num_tensors, elements):
    """Models of zeros that take no room on the disk, in bfloat16."""
    size = elements * STORED_DTYPES["BF16"].itemsize
    header = {
        f"model.layers.{i}.w": {
            "dtype": "BF16",
            "shape": [elements],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(num_tensors)
    }
    text = json.dumps(header).encode()
    for name in ("base", "a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(CONFIG)
        path = folder / name / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + num_tensors * size)
    (folder / "recipe.yaml").write_text(RECIPE.format(method="task_arithmetic"))
    return folder


def test_memory_is_that_of_a_few_tensors_whatever_the_models_size(tmp_path):
    tensor_mib = 8
    small = make_holes(tmp_path / "small", 6, tensor_mib * MIB // 2)
    large = make_holes(tmp_path / "large", 24, tensor_mib * MIB // 2)
    command = [sys.executable, "-c", MEASURED, small, large]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    before, after_small, after_large = map(float, process.stdout.split())
    # three models of 192 MiB; mapped, they would add 3 * (192 - 48) MiB
    assert after_large - after_small < 6 * tensor_mib
    # three tensors that are read, their merge, the one before that is being written; and code
    assert after_small - before < 5 * tensor_mib + 60
