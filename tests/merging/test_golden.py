"""Merges agree with mergekit 0.1.5 in float32; written down by scripts/record_golden.py."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import read_recipe
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import merged_tensors
from evomerge.merging.plan import make_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit"
RECIPES = sorted((GOLDEN / "recipes").glob("*.yaml"))
TENSORS = sorted((GOLDEN / "tensors").glob("*.yaml"))
RANDOM = sorted((GOLDEN / "random").glob("*.yaml"))

# of an element, see `difference`: 16 half units of the last place, for some ten roundings each of
# which either program makes
TOLERANCE = 1e-6
# how far mergekit's float32 is from its own float64, for tensors where that is much
ROUGH = json.loads((GOLDEN / "rough.json").read_text())

METHODS_OF_MERGEKIT = [
    "linear",
    "slerp",
    "nuslerp",
    "passthrough",
    "model_stock",
    "arcee_fusion",
    "karcher",
    "multislerp",
    "nearswap",
    "sce",
    "ram",
    "ramplus_tl",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "dare_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
]

FILES = {
    "recipes": ("models.safetensors", "merged.safetensors"),
    "tensors": ("tensors.safetensors", "merged_tensors.safetensors"),
}
MODELS = ("base", "a", "b", "c")


def load(file, name):
    """Tensors of one model or recipe from a file of many."""
    tensors = load_file(GOLDEN / file)
    return {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{name}/")}


def merged(recipe, file):
    """Our merge of models kept in a golden file."""
    sources = {
        str(ref): MemorySource(load(file, str(ref)), str(ref)) for ref in recipe.references()
    }
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    return merged_tensors(plan, sources, StatisticsCache())


def difference(ours, theirs):
    """Largest difference of an element, relative to it or to the tensor's root mean square.

    Whichever of the two is larger: elements near 0 are sums of larger ones.
    """
    ours, theirs = ours.double(), theirs.double()
    size = theirs.abs().clamp(min=theirs.square().mean().sqrt())
    return ((ours - theirs).abs() / size).max().item()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_models_agree(path):
    ours = merged(read_recipe(path), "models.safetensors")
    theirs = load("merged.safetensors", path.stem)
    assert ours.keys() == theirs.keys()
    rough = ROUGH.get(path.stem, {})
    for name, tensor in theirs.items():
        assert difference(ours[name], tensor) <= TOLERANCE + rough.get(name, 0.0), name


@pytest.mark.parametrize("path", TENSORS, ids=lambda path: path.stem)
def test_tensors_of_one_to_three_dimensions_agree(path):
    """And where float32 is not enough, ours are the nearer to mergekit's in float64."""
    ours = merged(read_recipe(path), "tensors.safetensors")
    theirs = load("merged_tensors.safetensors", path.stem)
    assert sorted(tensor.ndim for tensor in ours.values()) == [1, 2, 3]
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        exact = theirs[f"{name}/float64"]
        rough = difference(theirs[name], exact)
        assert difference(tensor, theirs[name]) <= TOLERANCE + rough, name
        assert difference(tensor, exact) <= max(TOLERANCE, rough), name


@pytest.mark.parametrize("path", RANDOM, ids=lambda path: path.stem)
def test_random_merges_have_the_same_distribution(path):
    """Other masks, so only what they have in common over 64 seeds is compared.

    The bounds are five standard errors of a difference of two means, and for the mean of every
    element the average of 1920 squared differences in units of their variance, which is 1 +- 0.03.
    """
    recipe, theirs = read_recipe(path), load("random.safetensors", path.stem)
    name, num_seeds = "model.layers.0.matrix", len(theirs["l1"])
    base = load("matrix.safetensors", "base")[name]
    seeds = [recipe.model_copy(update={"mask_seed": seed}) for seed in range(num_seeds)]
    every = torch.stack([merged(one, "matrix.safetensors")[name] for one in seeds])
    changed, l1 = (every != base).float().mean((1, 2)), (every - base).abs().sum((1, 2))
    for ours, expected in ((changed, theirs["changed"]), (l1, theirs["l1"])):
        error = ((ours.var() + expected.var()) / num_seeds).sqrt()
        assert (ours.mean() - expected.mean()).abs() <= 5 * error
        assert 0.6 < ours.std() / expected.std() < 1.6
    variance = (every.var(0) + theirs["std"].square()) / num_seeds
    gap = (every.mean(0) - theirs["mean"]).square() / variance
    assert gap.mean() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("path", [*RECIPES, *TENSORS], ids=lambda path: path.stem)
def test_a_merge_that_does_nothing_would_be_seen(path):
    """The tolerance tells every golden merge from every model that went in."""
    recipe, files = yaml.safe_load(path.read_text()), FILES[path.parent.stem]
    theirs = load(files[1], path.stem)
    if recipe["merge_method"] == "passthrough":
        return
    for model in MODELS:
        apart = [
            name not in theirs or difference(tensor, theirs[name]) > TOLERANCE
            for name, tensor in load(files[0], model).items()
        ]
        assert any(apart), model


@pytest.mark.parametrize("paths", [RECIPES, TENSORS], ids=list(FILES))
def test_every_method_of_mergekit_has_a_recipe(paths):
    methods = {yaml.safe_load(path.read_text())["merge_method"] for path in paths}
    assert methods == set(METHODS_OF_MERGEKIT)
