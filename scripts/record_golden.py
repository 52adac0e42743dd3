"""Write tests/golden/mergekit: small models and tensors, and what mergekit 0.1.5 makes of them.

    python scripts/record_golden.py ORACLE/bin/python

ORACLE is an environment with mergekit (see mergekit_worker.py). The recipes there are written by
hand and handed to mergekit as they are, names of models made paths; nothing of evomerge takes part.
Nothing else writes the safetensors files:

- `models`, `merged`: models of three layers, merged by `recipes/`; and where mergekit's float32 is
  far from its own float64, `rough.json` says how far;
- `tensors`, `merged_tensors`: tensors of one to three dimensions, merged by `tensors/` in float32
  and in float64;
- `matrix`, `random`: a matrix merged by `random/`; statistics over seeds.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from compare_mergekit import (
    GOLDEN,
    MATRIX,
    MODELS,
    NUM_SEEDS,
    RANKS,
    difference,
    load,
    make_models,
    make_tensors,
    place_recipes,
    run_worker,
    statistics_of,
)
from safetensors.torch import load_file, save_file

# beyond the first a float32 result is rough; beyond the second other elements were selected
ROUGH, OTHER = 5e-7, 1e-4
MADE_BY = {"made_by": "python scripts/record_golden.py ORACLE/bin/python, with mergekit 0.1.5"}


def main() -> None:
    """Let mergekit carry out every recipe, and keep what came in and out."""
    oracle = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        record_models(oracle, root)
        record_tensors(oracle, root)
        record_random(oracle, root)


def record_models(oracle: str, root: Path) -> None:
    """Record whole models; tensor names come after `/`."""
    models = make_models(root / "models", hidden_size=8, num_layers=3, vocab_size=16)
    for dtype in ("float32", "float64"):
        names = place_recipes(GOLDEN / "recipes", models, root / f"recipes.{dtype}", dtype)
        run_worker(oracle, "models", root / f"recipes.{dtype}", root / dtype)
    keep([models / name for name in MODELS], GOLDEN / "models.safetensors")
    keep([root / "float32" / name for name in names], GOLDEN / "merged.safetensors")
    rough = {
        name: rough_tensors(root / "float32" / name, root / "float64" / name) for name in names
    }
    text = json.dumps({name: found for name, found in rough.items() if found}, indent=1)
    (GOLDEN / "rough.json").write_text(text + "\n")


def rough_tensors(single: Path, double: Path) -> dict[str, float]:
    """Return how far a merge in float32 is from that in float64, for tensors where it is far."""
    exact = load(double)
    found = {name: difference(tensor, exact[name]) for name, tensor in load(single).items()}
    return {name: value for name, value in found.items() if ROUGH < value < OTHER}


def keep(folders: list[Path], path: Path) -> None:
    """Write the tensors of several checkpoints into one file."""
    tensors = {
        f"{folder.name}/{name}": tensor
        for folder in folders
        for name, tensor in load(folder).items()
    }
    save_file(tensors, path, metadata=MADE_BY)


def record_tensors(oracle: str, root: Path) -> None:
    """Record bare tensors of one to three dimensions."""
    inputs = GOLDEN / "tensors.safetensors"
    save_file(make_tensors(RANKS), inputs, metadata=MADE_BY)
    kept = {}
    for dtype, suffix in (("float32", ""), ("float64", "/float64")):
        out = root / f"{dtype}.safetensors"
        run_worker(oracle, "tensors", GOLDEN / "tensors", inputs, out, "--dtype", dtype)
        kept |= {f"{name}{suffix}": tensor for name, tensor in load_file(out).items()}
    save_file(kept, GOLDEN / "merged_tensors.safetensors", metadata=MADE_BY)


def record_random(oracle: str, root: Path) -> None:
    """Record the methods that draw at random, over seeds."""
    inputs, out = GOLDEN / "matrix.safetensors", root / "random.safetensors"
    save_file(make_tensors(MATRIX), inputs, metadata=MADE_BY)
    run_worker(oracle, "tensors", GOLDEN / "random", inputs, out, "--seeds", str(NUM_SEEDS))
    base, merged = load_file(inputs)["base/model.layers.0.matrix"], load_file(out)
    kept = {}
    for name in sorted({key.partition("/")[0] for key in merged}):
        every = [merged[f"{name}/model.layers.0.matrix/{seed}"] for seed in range(NUM_SEEDS)]
        statistics = statistics_of(torch.stack(every), base)
        kept |= {f"{name}/{what}": tensor for what, tensor in statistics.items()}
    save_file(kept, GOLDEN / "random.safetensors", metadata=MADE_BY)


if __name__ == "__main__":
    main()
