"""A small real world to search in: a random base, two parents near it, two tasks, a config.

Nothing is faked.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from tests.tiny import make_model, make_tokenizer, write_tasks


def make_world(folder: Path, dtype=torch.float32) -> Path:
    """Write models `base`, `a`, `b` and tasks under the folder; returns it."""
    base = make_model(0, folder / "base", dtype)
    for seed, name in ((1, "a"), (2, "b")):
        parent = make_model(0, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in parent.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_((0.3 * base_scale(weight) * noise).to(dtype))
        parent.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    assert base.dtype == dtype
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks", num_test=40)
    return folder


def base_scale(weight: torch.Tensor) -> float:
    """Size of a tensor's elements, so that noise is small beside them."""
    return float(weight.float().std()) if weight.numel() > 1 else 1.0


def settings(world: Path, name="study", **changes) -> dict:
    """A search config as plain data; `changes` replace whole sections."""
    data = {
        "study": {
            "name": name,
            "folder": str(world / "runs" / name),
            "seed": 5,
            "budget": {"evaluations": 8},
            "baselines": ["uniform", "greedy_soup"],
        },
        "models": {"base": str(world / "base"), "parents": {n: str(world / n) for n in "ab"}},
        "merge": {"method": "task_arithmetic"},
        "space": {"weight": {"search": [0.0, 1.0]}},
        "suite": {
            "include_path": str(world / "tasks"),
            "tasks": [
                {"task": "tiny_choice", "metric": "acc"},
                {"task": "tiny_answer", "metric": "exact_match,whole"},
            ],
            "items": {"search": 16, "confirm": 8},
            "batch_size": 8,
            "chunks": 2,
        },
        "proposer": {"population": 4},
        "confirm": {"mean": False},
    }
    return {**data, **changes}


def write_config(world: Path, name="study", **changes) -> Path:
    """Write `settings` as YAML; returns the file."""
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(world, name, **changes), sort_keys=False))
    return path


def evomerge(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, as a user does."""
    command = [sys.executable, "-m", "evomerge.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def start(*arguments) -> subprocess.Popen:
    """Start the command line in the background."""
    command = [sys.executable, "-m", "evomerge.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen, ready, how=signal.SIGKILL) -> None:
    """Send a signal to a process the moment `ready()` holds; fails if it ends before."""
    while not ready():
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()}")
        select_pause()
    os.kill(process.pid, how)
    process.wait(timeout=120)


def select_pause() -> None:
    """Give the other process the CPU between two looks."""
    os.sched_yield()


def status_of(config: Path) -> dict:
    """What `evomerge status --json` says."""
    run = evomerge("status", config, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
