"""Merge to disk: seconds, CPU seconds and peak memory, beside a plain copy and beside mergekit.

    python -m benchmarks.merge_disk [--params 0.25B] [--mergekit PYTHON] [--profile]

Programs are run as commands, in turn, on the same base and three parents (bfloat16, a Llama's
shapes, noise from seeds), whose files are in the page cache. The copy is what the bytes alone cost:
the models read, and one model written and synced, in one thread, without any arithmetic. `x copy`
and `x mergekit` are ratios of wall time; of mergekit's three runs at most. With `--profile`, one
more merge is looked at every few milliseconds, and the table says where its main thread was.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType

import torch
from safetensors.torch import save_file

from benchmarks.measure import Ratio, Row, parser, show, size

MODELS = ("a", "b", "c")
WEIGHTS = (0.5, 0.3, 0.2)
POOL = 2**25
"""Random numbers that are drawn; each tensor is a stretch of them, at a place of its own."""

METHODS = {"linear": None, "ties": "base"}
"""Method -> its base model."""

MOST_MERGEKIT_ROUNDS = 3
"""A merge of a quarter of a billion parameters by TIES takes mergekit most of a minute."""

SAMPLE_S = 0.003

PARTS = (
    ("imports", ("<frozen importlib",)),
    ("waiting for the writer", ("/threading.py",)),
    ("finishing the files", ("evomerge/checkpoints/writer.py", "evomerge/merging/provenance.py")),
    ("checks and checksums", ("evomerge/checksums.py", "fingerprint.py", "is_finite", "_check")),
    ("tables and statistics", ("kernels/statistics.py", "evomerge/methods/", "statistics")),
    ("reading", ("evomerge/checkpoints/", "evomerge/adapters/")),
    ("kernel", ("evomerge/kernels/",)),
)
"""Where a thread is: the first of these with a word in the file or the function of a frame."""


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


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    made = parser(__doc__)
    made.set_defaults(rounds=5)
    made.add_argument("--method", choices=("all", *METHODS), default="all")
    made.add_argument("--params", type=size, default=size("0.25B"), help="such as 0.25B")
    made.add_argument("--mergekit", type=Path, help="Python of an environment with mergekit")
    made.add_argument("--profile", action="store_true", help="also tell where the time goes")
    arguments = made.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # a process counts the memory of the one it was forked from: keep this one small
        context = multiprocessing.get_context("spawn")
        maker = context.Process(target=make_models, args=(root, arguments.params))
        maker.start()
        maker.join()
        methods = list(METHODS) if arguments.method == "all" else [arguments.method]
        show([row_of(root, method, arguments) for method in methods], arguments.json)
        if arguments.profile:
            parts = [row for method in methods for row in profile_rows(root, method)]
            show(parts, arguments.json)


def make_models(root: Path, num_params: int) -> None:
    """Write base, a, b and c into folders of their names."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator)
    config = config_for(num_params)
    for number, model in enumerate(("base", *MODELS)):
        tensors, start = {}, 0
        for name, shape in shapes(config).items():
            count = shape.numel()
            values = 0.02 * stretch(pool, start, count)
            if number:
                values += 0.002 * stretch(pool, start + 7_654_321 * number, count)
            tensors[name] = values.bfloat16().reshape(shape)
            start += count
        (root / model).mkdir()
        (root / model / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, root / model / "model.safetensors", metadata={"format": "pt"})


def config_for(num_params: int) -> dict[str, object]:
    """Return the config of a Llama of about so many parameters; of 32000 tokens unless tiny."""
    hidden, vocab = (1024, 32000) if num_params >= 10**8 else (64, 512)
    inner = hidden * 11 // 4
    in_a_layer = (4 * hidden + 3 * inner) * hidden
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": max(1, round((num_params - 2 * vocab * hidden) / in_a_layer)),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def stretch(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return `count` numbers of the pool from `start` on, which goes round."""
    start %= len(pool)
    return torch.cat([pool[start : start + count], pool[: max(0, start + count - len(pool))]])


def shapes(config: Mapping[str, object]) -> dict[str, torch.Size]:
    """Return the tensors of a Llama."""
    hidden, inner, vocab, layers = (
        int(str(config[key]))
        for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for part in "qkvo":
            found[f"{prefix}.self_attn.{part}_proj.weight"] = (hidden, hidden)
        for part in ("gate", "up"):
            found[f"{prefix}.mlp.{part}_proj.weight"] = (inner, hidden)
        found[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        for part in ("input", "post_attention"):
            found[f"{prefix}.{part}_layernorm.weight"] = (hidden,)
    return {name: torch.Size(shape) for name, shape in found.items()}


def row_of(root: Path, method: str, arguments: argparse.Namespace) -> Row:
    """Run evomerge, the plain copy and mergekit in turn, and return the row of a method."""
    recipe, out = write_recipe(root, method), root / "out"
    read = [*MODELS, *([METHODS[method]] if METHODS[method] else [])]
    files = [root / model / "model.safetensors" for model in read]
    ours, theirs, copies = [], [], []
    for number in range(arguments.rounds):
        command = [sys.executable, "-m", "evomerge.cli.main", "merge", recipe, out]
        ours.append(cost_of(command, out))
        copies.append(copy_seconds(files, out))
        if arguments.mergekit and number < MOST_MERGEKIT_ROUNDS:
            command = [arguments.mergekit.absolute().with_name("mergekit-yaml"), recipe, out]
            theirs.append(cost_of(command, out))
    num_params = files[0].stat().st_size // 2
    ratios = [our.wall_s / copy_s for our, copy_s in zip(ours, copies, strict=True)]
    x_copy = Ratio(median(ratios), min(ratios), max(ratios))
    against = [their.wall_s / our.wall_s for our, their in zip(ours, theirs, strict=False)]
    more = {
        "clock": "wall",
        "params": num_params,
        **columns("", ours),
        "copy_wall_s": median(copies),
        **(columns("mergekit_", theirs) if theirs else {}),
        "x_mergekit_spread": [min(against), max(against)] if against else None,
    }
    return Row(
        "merge to disk",
        method,
        len(MODELS),
        1,
        x_copy,
        median(against) if against else None,
        more=more,
    )


def write_recipe(root: Path, method: str) -> Path:
    """Write the recipe of a method beside the models, as mergekit reads it too; return its path."""
    density = {} if METHODS[method] is None else {"density": 0.5}
    models = [
        {"model": f"./{model}", "parameters": {"weight": weight, **density}}
        for model, weight in zip(MODELS, WEIGHTS, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if METHODS[method]:
        recipe["base_model"] = f"./{METHODS[method]}"
    path = root / f"{method}.yaml"
    # JSON is YAML
    path.write_text(json.dumps(recipe))
    return path


def columns(prefix: str, costs: Sequence[Cost]) -> dict[str, float]:
    """Return the medians of what a program took, under names with a prefix."""
    return {
        f"{prefix}{name}": median(getattr(cost, name) for cost in costs)
        for name in ("wall_s", "cpu_s", "peak_gib")
    }


def cost_of(command: Sequence[str | Path], out: Path) -> Cost:
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


def copy_seconds(models: Sequence[Path], out: Path) -> float:
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


def profile_rows(root: Path, method: str) -> list[Row]:
    """Return the rows that say what a merge's main thread was at, the longest first."""
    recipe, out = write_recipe(root, method), root / "out"
    code = f"from benchmarks.merge_disk import merge_sampled; merge_sampled({time.monotonic()})"
    run = subprocess.run(
        [sys.executable, "-c", code, "merge", recipe, out],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        check=True,
    )
    shutil.rmtree(out)
    parts = Counter(json.loads(run.stdout.splitlines()[-1]))
    return [
        Row(f"in it: {part}", method, len(MODELS), 1, more={"clock": "wall", "wall_s": seconds})
        for part, seconds in parts.most_common()
    ]


def merge_sampled(started_at: float) -> None:
    """Run evomerge's command line in this process, and print where its time went, as JSON.

    Args:
        started_at: Of the process, by the monotonic clock.
    """
    parts = Counter({"start, and imports of torch and safetensors": time.monotonic() - started_at})
    stop = threading.Event()
    sampler = threading.Thread(target=sample, args=(threading.get_ident(), parts, stop))
    sampler.start()
    try:
        from evomerge.cli.main import cli

        cli(sys.argv[1:], standalone_mode=False)
    finally:
        stop.set()
        sampler.join()
    print(json.dumps(parts))


def sample(thread_id: int, parts: "Counter[str]", stop: threading.Event) -> None:
    """Add to `parts` the seconds that a thread spends in each, until it is told to stop."""
    last = time.monotonic()
    while not stop.wait(SAMPLE_S):
        frame = sys._current_frames()[thread_id]
        now = time.monotonic()
        parts[part_of(frame)] += now - last
        last = now


def part_of(frame: FrameType | None) -> str:
    """Return what a thread is at, by the files and functions of its frames; see `PARTS`."""
    places = list(_places(frame))
    for part, words in PARTS:
        if any(word in place for place in places for word in words):
            return part
    return "rest"


def _places(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        frame = frame.f_back


if __name__ == "__main__":
    main()
