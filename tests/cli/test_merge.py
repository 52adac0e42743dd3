"""`evomerge merge`: what it prints, where, and how it goes on."""

import json
import os
import re
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.cli.main import main
from evomerge.merging.folder import Progress

RECIPE = """
merge_method: linear
models:
  - {model: ./a, parameters: {weight: 0.5}}
  - {model: ./b, parameters: {weight: 0.25}}
"""
NUM_TENSORS = 6
TENSOR_BYTES = 4 * 64 * 64


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{i}.w": torch.randn(64, 64, generator=generator)
            for i in range(NUM_TENSORS)
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["evomerge", "merge", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


def test_it_prints_folder_digest_time_and_bytes(models, run):
    code, out, err = run(models / "recipe.yaml", models / "out")
    assert (code, err) == (0, "")  # no progress where stderr is no terminal
    digest = digest_of(open_checkpoint(models / "out"))
    first, second = out.splitlines()
    assert first == f"{models / 'out'}  digest {digest}"
    assert re.fullmatch(r"6 tensors in \d+\.\d s, 0\.00 GiB read, 0\.00 GiB written", second)


def test_programs_get_the_same_facts(models, run):
    code, out, _ = run(models / "recipe.yaml", models / "out", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts.pop("seconds") >= 0
    assert facts == {
        "folder": str(models / "out"),
        "digest": digest_of(open_checkpoint(models / "out")),
        "read_bytes": 2 * NUM_TENSORS * TENSOR_BYTES,
        "written_bytes": NUM_TENSORS * TENSOR_BYTES,
        "resumed_shards": [],
    }


def test_the_folder_is_complete(models, run):
    run(models / "recipe.yaml", models / "out")
    assert sorted(path.name for path in (models / "out").iterdir()) == [
        "README.md",
        "config.json",
        "evomerge.json",
        "model.safetensors",
        "recipe.yaml",
    ]
    card = (models / "out" / "README.md").read_text()
    record = json.loads((models / "out" / "evomerge.json").read_text())
    assert record["digest"] in card
    assert str(models) not in card


def test_shard_gib_bounds_the_files(models, run):
    gib = 2 * TENSOR_BYTES / 2**30
    _, one, _ = run(models / "recipe.yaml", models / "one")
    _, many, _ = run(models / "recipe.yaml", models / "many", "--shard-gib", gib)
    files = sorted((models / "many").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert all(path.stat().st_size < 2 * TENSOR_BYTES + 1000 for path in files)
    assert one.split()[2] == many.split()[2]
    code, _, err = run(models / "recipe.yaml", models / "none", "--shard-gib", 0)
    assert code == 2
    assert "--shard-gib" in err


def test_the_same_command_goes_on_after_a_kill(models, run, monkeypatch):
    command = (models / "recipe.yaml", models / "out", "--shard-gib", 2 * TENSOR_BYTES / 2**30)
    child = os.fork()
    if not child:
        monkeypatch.setattr(
            "evomerge.cli.merge.ProgressLine.show",
            lambda line, told: told.num_done < 3 or os.kill(os.getpid(), signal.SIGKILL),
        )
        try:
            run(*command)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    _, out, _ = run(*command, "--json")
    facts = json.loads(out)
    kept = facts["resumed_shards"]
    assert kept[0] == "model-00001-of-00003.safetensors"
    assert facts["written_bytes"] == (NUM_TENSORS - 2 * len(kept)) * TENSOR_BYTES
    assert facts["digest"] == digest_of(open_checkpoint(models / "out"))


def test_shards_that_were_kept_are_told(models, run, monkeypatch):
    told = Progress(6, 6, 0, 0, ("model-00001-of-00003.safetensors",))
    monkeypatch.setattr(
        "evomerge.merging.run.merge", lambda *_, notify, **__: notify(told) or "d" * 64
    )
    _, out, _ = run(models / "recipe.yaml", models / "out")
    assert out.splitlines()[2] == "kept from an earlier run: model-00001-of-00003.safetensors"


def test_on_a_terminal_a_line_follows_and_is_taken_away(models, run, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("evomerge.cli.merge.time.monotonic", lambda: next(ticks))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(models / "recipe.yaml", models / "out")
    assert code == 0
    lines = err.split("\r\x1b[K")
    assert lines[1] == "0/6 tensors, 0.00 GiB read, 0.00 GiB written"
    assert lines[-2] == "6/6 tensors, 0.00 GiB read, 0.00 GiB written"
    assert lines[-1] == ""
    assert "tensors," not in out


def test_an_error_is_one_sentence_and_leaves_nothing(models, run):
    (models / "b" / "model.safetensors").write_bytes(b"")
    code, out, err = run(models / "recipe.yaml", models / "out")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "recipe.yaml"]


def test_a_folder_in_use_is_refused(models, run):
    (models / "out").mkdir()
    (models / "out" / "mine").write_text("mine")
    code, _, err = run(models / "recipe.yaml", models / "out")
    assert code == 1
    assert "exists and is not an empty folder" in err
    assert [path.name for path in (models / "out").iterdir()] == ["mine"]
