"""Compare our merges with mergekit's, tensor by tensor, on small models made from seeds.

    python scripts/compare_mergekit.py [ORACLE/bin/python]

ORACLE is an environment with mergekit 0.1.5; without it one is made in the user's cache folder. The
recipes are those of tests/golden/mergekit: `recipes/` on whole models, handed to mergekit as we
export them, and `tensors/` on bare tensors of one to three dimensions. Printed is the largest
difference of an element, relative to the element, or to the root mean square of its tensor where
the element is smaller. Methods that draw at random draw other masks than mergekit, so there the
statistics over several seeds are compared.
"""

import argparse
import subprocess
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import parse_recipe, write_recipe
from evomerge.config.recipe import Recipe
from evomerge.errors import EvoMergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import merged_tensors
from evomerge.merging.plan import make_plan
from evomerge.merging.run import merge

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mergekit"
WORKER = Path(__file__).with_name("mergekit_worker.py")
PACKAGES = ("torch==2.13.0", "mergekit==0.1.5")

# name -> how far its parameters lie from the base; c is far enough for slerp to leave the line
MODELS = {"base": 0.0, "a": 0.01, "b": 0.01, "c": 0.05}

RANKS = {"rank1": (37,), "rank2": (9, 14), "rank3": (3, 8, 5)}
MATRIX = {"matrix": (40, 48)}
FAR = {"base": 0.0, "a": 0.05, "b": 0.05, "c": 0.5}
NUM_SEEDS = 64

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("oracle", nargs="?", help="Python of an environment with mergekit")
    oracle = parser.parse_args().oracle or make_oracle()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(
            "Largest difference of an element, relative to it or to its tensor's root mean square,"
        )
        print("whichever is larger. Whole models in float32:")
        compare_models(oracle, root / "models")
        compare_tensors(oracle, root / "tensors")
        compare_random(oracle, root / "random")


def make_oracle() -> str:
    """Return the Python of an environment with mergekit in the cache folder, made where missing.

    torch comes first, so that mergekit does not choose another.
    """
    folder = Path.home() / ".cache" / "evomerge" / "mergekit-0.1.5"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        for package in PACKAGES:
            subprocess.run([python, "-m", "pip", "install", package], check=True)
        (folder / "complete").touch()
    return str(python)


def run_worker(oracle: str, *arguments: str | Path) -> None:
    """Run mergekit in its own environment."""
    subprocess.run([oracle, str(WORKER), *map(str, arguments)], check=True)


def make_models(folder: Path, hidden_size: int, num_layers: int, vocab_size: int) -> Path:
    """Write the models, tiny Llamas in float32, into a folder for each."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i, (name, distance) in enumerate(MODELS.items()):
        generator = torch.Generator().manual_seed(i)
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(base[key] + distance * noise)
        model.save_pretrained(folder / name)
    return folder


def make_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return tensors of every model as MODEL/TENSOR; in float32 no two magnitudes are equal."""
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for j, (model, distance) in enumerate(FAR.items()):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(100 * i + j + 7))
            tensors[f"{model}/model.layers.0.{name}"] = base + distance * noise
    return tensors


def place_recipes(recipes: Path, models: Path, out: Path, dtype: str) -> list[str]:
    """Copy recipes as they are but for the models' names, made paths, and the dtype.

    Returns:
        The recipes' names.
    """
    out.mkdir(parents=True)
    paths = sorted(recipes.glob("*.yaml"))
    for path in paths:
        data = {**placed(yaml.safe_load(path.read_text()), models), "dtype": dtype}
        (out / path.name).write_text(yaml.safe_dump(data, sort_keys=False))
    return [path.stem for path in paths]


def placed(data: Any, models: Path) -> Any:
    """Return plain data with the names of models under `model` and `base_model` made paths."""
    if isinstance(data, list):
        return [placed(item, models) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        key: str(models / value) if key in ("model", "base_model") else placed(value, models)
        for key, value in data.items()
    }


def load(folder: Path) -> Tensors:
    """Return the tensors of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def compare_models(oracle: str, root: Path) -> None:
    """Carry out every recipe on whole models with both programs."""
    models = make_models(root / "models", hidden_size=64, num_layers=3, vocab_size=259)
    recipes = {}
    for path in sorted((GOLDEN / "recipes").glob("*.yaml")):
        try:
            recipes[path.stem] = parse_recipe(path.read_text(), path.name, models)
            merge(recipes[path.stem], root / "ours" / path.stem)
        except EvoMergeError as error:
            recipes.pop(path.stem, None)
            print(f"{path.stem:24s} refused: {error}")
    write_recipes(recipes, root / "recipes")
    run_worker(oracle, "models", root / "recipes", root / "theirs")
    for name in recipes:
        compare(name, load(root / "ours" / name), load(root / "theirs" / name))


def write_recipes(recipes: dict[str, Recipe], out: Path) -> None:
    """Write recipes as we export them."""
    out.mkdir()
    for name, recipe in recipes.items():
        (out / f"{name}.yaml").write_text(write_recipe(recipe))


def compare(name: str, ours: Tensors, theirs: Tensors) -> None:
    """Print the largest difference of a model's tensors."""
    assert ours.keys() == theirs.keys()
    largest = max(difference(ours[key], theirs[key]) for key in ours)
    equal = sum(torch.equal(ours[key], theirs[key]) for key in ours)
    print(f"{name:24s} {largest:.1e}, {equal} of {len(ours)} tensors equal")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference of an element.

    Relative to that element, or to the root mean square of `theirs` where the element is smaller.
    """
    ours, theirs = ours.double(), theirs.double()
    size = theirs.abs().clamp(min=theirs.square().mean().sqrt())
    return ((ours - theirs).abs() / size).max().item()


def merge_in_memory(recipe: Recipe, inputs: Tensors) -> Tensors:
    """Carry out a recipe on bare tensors named MODEL/TENSOR."""
    sources = {
        str(ref): MemorySource(
            {key.partition("/")[2]: t for key, t in inputs.items() if key.startswith(f"{ref}/")},
            str(ref),
        )
        for ref in recipe.references()
    }
    layout = layout_of(sources[str(recipe.donor)].names())
    return merged_tensors(make_plan(recipe, sources, layout), sources, StatisticsCache())


def compare_tensors(oracle: str, root: Path) -> None:
    """Carry out every recipe on bare tensors; mergekit also in float64, which says who is right."""
    root.mkdir()
    inputs = make_tensors(RANKS)
    save_file(inputs, root / "inputs.safetensors")
    theirs = {}
    for dtype in ("float32", "float64"):
        out = root / f"{dtype}.safetensors"
        run_worker(
            oracle,
            "tensors",
            GOLDEN / "tensors",
            root / "inputs.safetensors",
            out,
            "--dtype",
            dtype,
        )
        theirs[dtype] = load_file(out)
    print(
        "\nTensors of 1, 2 and 3 dimensions, and each program's distance from mergekit in float64:"
    )
    for path in sorted((GOLDEN / "tensors").glob("*.yaml")):
        try:
            ours = merge_in_memory(parse_recipe(path.read_text(), path.name), inputs)
        except EvoMergeError as error:
            print(f"{path.stem:24s} refused: {error}")
            continue
        keys = {name: f"{path.stem}/{name}" for name in ours}
        single, double = theirs["float32"], theirs["float64"]
        apart = [difference(ours[n], single[k]) for n, k in keys.items()]
        off_ours = max(difference(ours[n], double[k]) for n, k in keys.items())
        off_theirs = max(difference(single[k], double[k]) for k in keys.values())
        columns = " ".join(f"{value:.1e}" for value in apart)
        print(f"{path.stem:24s} {columns}   ours {off_ours:.1e}, mergekit {off_theirs:.1e}")


def statistics_of(every: torch.Tensor, base: torch.Tensor) -> Tensors:
    """Return what random merges have in common.

    Args:
        every: Merged matrices, shape (seeds, rows, columns).
        base: The base's.

    Returns:
        `mean` and `std` over seeds for each element; for each seed the share of elements that are
        not the base's (`changed`) and the L1 norm of the difference from the base (`l1`).
    """
    return {
        "mean": every.mean(0),
        "std": every.std(0),
        "changed": (every != base).float().mean((1, 2)),
        "l1": (every - base).abs().sum((1, 2)),
    }


def compare_random(oracle: str, root: Path) -> None:
    """Print statistics of the methods that draw at random, over seeds."""
    root.mkdir()
    inputs = make_tensors(MATRIX)
    save_file(inputs, root / "inputs.safetensors")
    out = root / "theirs.safetensors"
    run_worker(
        oracle,
        *("tensors", GOLDEN / "random", root / "inputs.safetensors", out),
        *("--seeds", str(NUM_SEEDS)),
    )
    theirs, base = load_file(out), inputs["base/model.layers.0.matrix"]
    print(f"\nRandom masks, {NUM_SEEDS} seeds, ours | mergekit:")
    for path in sorted((GOLDEN / "random").glob("*.yaml")):
        try:
            recipe = parse_recipe(path.read_text(), path.name)
            ours = [
                merge_in_memory(recipe.model_copy(update={"mask_seed": seed}), inputs)
                for seed in range(NUM_SEEDS)
            ]
        except EvoMergeError as error:
            print(f"{path.stem:24s} refused: {error}")
            continue
        name = "model.layers.0.matrix"
        our = statistics_of(torch.stack([merged[name] for merged in ours]), base)
        every = [theirs[f"{path.stem}/{name}/{seed}"] for seed in range(NUM_SEEDS)]
        print(describe_random(path.stem, our, statistics_of(torch.stack(every), base)))


def describe_random(name: str, ours: Tensors, theirs: Tensors) -> str:
    """Return a line: share changed, L1 norm, and how far the means are apart."""
    parts = [
        f"{what} {a[what].mean():.4f} +- {a[what].std():.4f} | "
        f"{b[what].mean():.4f} +- {b[what].std():.4f}"
        for a, b in [(ours, theirs)]
        for what in ("changed", "l1")
    ]
    return f"{name:24s} {', '.join(parts)}, means apart {mean_gap(ours, theirs):.3f} (1 expected)"


def mean_gap(ours: Tensors, theirs: Tensors) -> float:
    """Return the squared difference of two means over seeds, in units of its own variance.

    Averaged over elements; near 1 when both are means of the same distribution.
    """
    variance = (ours["std"].square() + theirs["std"].square()) / NUM_SEEDS
    moves = variance > 1e-12
    gap = (ours["mean"] - theirs["mean"]).square()
    return (gap[moves] / variance[moves]).mean().item()


if __name__ == "__main__":
    main()
