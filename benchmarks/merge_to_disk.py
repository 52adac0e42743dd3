"""Merge to disk beside mergekit: seconds, CPU seconds and peak memory of both, in one run.

    python -m benchmarks.merge_to_disk ORACLE/bin/python

ORACLE is an environment with mergekit. Both programs are run as commands, in turn, on the same
three parents and base (0.25 B parameters each, bfloat16, Llama's shapes, noise from seeds); their
files are in the page cache for both. The roof is what the bytes alone cost: the models read and one
model written and synced, in one thread, without any arithmetic.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
POOL = 2**25
"""Random numbers that are drawn; each tensor is a stretch of them, at a place of its own."""

LINEAR = """\
merge_method: linear
models:
  - {model: ./a, parameters: {weight: 0.5}}
  - {model: ./b, parameters: {weight: 0.3}}
  - {model: ./c, parameters: {weight: 0.2}}
dtype: bfloat16
"""
TIES = """\
merge_method: ties
base_model: ./base
models:
  - {model: ./a, parameters: {weight: 0.5, density: 0.5}}
  - {model: ./b, parameters: {weight: 0.3, density: 0.5}}
  - {model: ./c, parameters: {weight: 0.2, density: 0.5}}
dtype: bfloat16
"""
CASES = {"linear": (LINEAR, 3), "ties": (TIES, 1)}
"""Name -> recipe, and how often each program is run."""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        wall_s: Seconds on the clock.
        cpu_s: Seconds of CPU, user and system.
        peak_gib: Largest resident memory, mapped files included.
    """

    wall_s: float
    cpu_s: float
    peak_gib: float


def main() -> None:
    """Make the models, run everything, print the table."""
    oracle = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # a process counts the memory of the one it was forked from: keep this one small
        maker = multiprocessing.get_context("spawn").Process(target=make_models, args=(root,))
        maker.start()
        maker.join()
        num_parameters = sum(shape.numel() for shape in shapes().values())
        print(f"{num_parameters / 1e9:.3f} B parameters, {os.cpu_count()} CPUs, {versions(oracle)}")
        print("\n| method | program | wall s | user+sys s | peak GiB | wall, mergekit / evomerge |")
        print("| --- | --- | --- | --- | --- | --- |")
        for method, (recipe, repeats) in CASES.items():
            (root / f"{method}.yaml").write_text(recipe)
            print_rows(method, *run_in_turn(root, method, oracle, repeats))


def make_models(root: Path) -> None:
    """Write base, a, b and c into folders of their names."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator)
    for number, model in enumerate(("base", "a", "b", "c")):
        tensors, start = {}, 0
        for name, shape in shapes().items():
            size = shape.numel()
            values = 0.02 * stretch(pool, start, size)
            if number:
                values += 0.002 * stretch(pool, start + 7_654_321 * number, size)
            tensors[name] = values.bfloat16().reshape(shape)
            start += size
        (root / model).mkdir()
        (root / model / "config.json").write_text(json.dumps(CONFIG, indent=2))
        save_file(tensors, root / model / "model.safetensors", metadata={"format": "pt"})


def stretch(pool: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Return `size` numbers of the pool from `start` on, which goes round."""
    start %= len(pool)
    return torch.cat([pool[start : start + size], pool[: max(0, start + size - len(pool))]])


def shapes() -> dict[str, torch.Size]:
    """Return the tensors of a Llama of `CONFIG`."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "lm_head.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for part in "qkvo":
            found[f"{prefix}.self_attn.{part}_proj.weight"] = (hidden, hidden)
        for part in ("gate", "up"):
            found[f"{prefix}.mlp.{part}_proj.weight"] = (inner, hidden)
        found[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        for part in ("input", "post_attention"):
            found[f"{prefix}.{part}_layernorm.weight"] = (hidden,)
    return {name: torch.Size(shape) for name, shape in found.items()}


def versions(oracle: Path) -> str:
    """Return what is compared."""
    code = "import torch, importlib.metadata as m; print(m.version('mergekit'), torch.__version__)"
    theirs = subprocess.run([oracle, "-c", code], capture_output=True, text=True, check=True)
    mergekit, their_torch = theirs.stdout.split()
    return f"torch {torch.__version__}; mergekit {mergekit} with torch {their_torch}"


def run_in_turn(
    root: Path, method: str, oracle: Path, repeats: int
) -> tuple[list[Cost], list[Cost], list[float]]:
    """Run evomerge, mergekit and the plain copy one after another, `repeats` times."""
    recipe, out = root / f"{method}.yaml", root / "out"
    ours_command = [sys.executable, "-m", "evomerge.cli.main", "merge", recipe, out]
    theirs_command = [oracle.with_name("mergekit-yaml"), recipe, out]
    models = [root / name / "model.safetensors" for name in "abc"]
    if method != "linear":
        models.append(root / "base" / "model.safetensors")
    ours, theirs, roofs = [], [], []
    for _ in range(repeats):
        ours.append(cost_of(ours_command, out))
        theirs.append(cost_of(theirs_command, out))
        roofs.append(copy_seconds(models, out))
    return ours, theirs, roofs


def cost_of(command: list[str | Path], out: Path) -> Cost:
    """Run a command that writes the folder `out`, and remove that."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert process.returncode == 0, f"{command[0]} failed:\n{errors}"
    assert written > 0, f"{command[0]} wrote no weights:\n{errors}"
    shutil.rmtree(out)
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def copy_seconds(models: list[Path], out: Path) -> float:
    """Return how long it takes to read the models, and to write and sync the first of them."""
    piece = memoryview(bytearray(2**23))
    start = time.perf_counter()
    with out.open("wb", buffering=0) as target:
        for number, model in enumerate(models):
            with model.open("rb", buffering=0) as file:
                while count := file.readinto(piece):
                    if number == 0:
                        target.write(piece[:count])
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def print_rows(method: str, ours: list[Cost], theirs: list[Cost], roofs: list[float]) -> None:
    """Print a method's rows: medians, and the ratio of the medians with its extremes."""
    ratios = [their.wall_s / our.wall_s for our, their in zip(ours, theirs, strict=True)]
    median = _median(theirs, "wall_s") / _median(ours, "wall_s")
    ratio = f"{median:.1f} ({min(ratios):.1f} to {max(ratios):.1f}, n={len(ratios)})"
    for program, costs, last in (("evomerge", ours, ratio), ("mergekit-yaml", theirs, "")):
        cells = [f"{_median(costs, field):.2f}" for field in ("wall_s", "cpu_s", "peak_gib")]
        print(f"| {method} | {program} | {' | '.join(cells)} | {last} |")
    print(f"| {method} | copy of the bytes | {statistics.median(roofs):.2f} | | | |", flush=True)


def _median(costs: list[Cost], field: str) -> float:
    return statistics.median(getattr(cost, field) for cost in costs)


if __name__ == "__main__":
    main()
