"""Compare our merges with mergekit's, tensor by tensor, on small models made from seeds.

    python scripts/compare_mergekit.py ORACLE/bin/python

ORACLE is an environment with mergekit (see mergekit_worker.py). The recipes are those of
tests/golden/mergekit, handed to mergekit as we export them. DARE draws other masks than mergekit,
so there the statistics over several seeds are compared.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.config.mergekit import parse_recipe, write_recipe
from evomerge.config.recipe import Recipe
from evomerge.merging.run import merge

RECIPES = Path(__file__).parents[1] / "tests" / "golden" / "mergekit" / "recipes"
WORKER = Path(__file__).with_name("mergekit_worker.py")

# name -> how far its parameters lie from the base; c is far enough for slerp to leave the line
MODELS = {"base": 0.0, "a": 0.01, "b": 0.01, "c": 0.05}

NUM_SEEDS = 8
DARE = """
merge_method: dare_linear
base_model: base
models: [{model: a, parameters: {weight: 0.6, density: 0.3}}]
dtype: float32
"""


def main() -> None:
    """Print a line for each recipe, then the statistics of DARE."""
    oracle = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = make_models(root / "models", hidden_size=64, num_layers=4, vocab_size=259)
        texts = {path.stem: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}
        recipes = {name: parse_recipe(text, name, models) for name, text in texts.items()}
        run_mergekit(oracle, recipes, root / "theirs")
        for name, recipe in recipes.items():
            merge(recipe, root / "ours" / name)
            compare(name, load(root / "ours" / name), load(root / "theirs" / name))
        compare_dare(oracle, parse_recipe(DARE, "dare", models), root / "dare")


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


def run_mergekit(oracle: str, recipes: dict[str, Recipe], out: Path, *options: str) -> None:
    """Let mergekit carry out the recipes as we export them; their paths are absolute."""
    files = out / "recipes"
    files.mkdir(parents=True)
    for name, recipe in recipes.items():
        (files / f"{name}.yaml").write_text(write_recipe(recipe))
    subprocess.run([oracle, str(WORKER), str(files), str(out), *options], check=True)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def compare(name: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Print the largest difference of an element, relative to its tensor's root mean square."""
    assert ours.keys() == theirs.keys()
    largest = max(
        ((ours[key] - theirs[key]).abs().max() / theirs[key].square().mean().sqrt()).item()
        for key in ours
    )
    equal = sum(torch.equal(ours[key], theirs[key]) for key in ours)
    print(f"{name:22s} largest difference {largest:.1e}, {equal} of {len(ours)} tensors equal")


def compare_dare(oracle: str, recipe: Recipe, root: Path) -> None:
    """Print the share of elements kept and the L1 norm of the merged task vector, over seeds."""
    run_mergekit(oracle, {"dare": recipe}, root / "theirs", "--seeds", str(NUM_SEEDS))
    base = load(Path(recipe.donor.path))
    whole = l1_norm(load(Path(recipe.models[0].model.path)), base)
    for seed in range(NUM_SEEDS):
        merge(recipe.model_copy(update={"mask_seed": seed}), root / "ours" / f"dare.{seed}")
    for who in ("ours", "theirs"):
        merged = [load(root / who / f"dare.{seed}") for seed in range(NUM_SEEDS)]
        changed = torch.tensor([share_changed(tensors, base) for tensors in merged])
        norms = torch.tensor([l1_norm(tensors, base) / whole for tensors in merged])
        print(
            f"dare, {who:6s}: kept {changed.mean():.4f} +- {changed.std():.4f}, "
            f"L1 norm {norms.mean():.6f} +- {norms.std():.1e} of the task vector's"
        )


def share_changed(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    """Return the share of elements that differ from the base's."""
    changed = sum((merged[name] != base[name]).sum().item() for name in base)
    return changed / sum(tensor.numel() for tensor in base.values())


def l1_norm(model: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    """Return the sum of magnitudes of a model's task vector."""
    return sum((model[name] - base[name]).double().abs().sum().item() for name in base)


if __name__ == "__main__":
    main()
