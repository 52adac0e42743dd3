"""Merges agree with mergekit 0.1.5 in float32; written down by scripts/record_golden.py."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import read_recipe
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import execute
from evomerge.merging.plan import make_plan
from evomerge.methods import METHODS

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit"
RECIPES = sorted((GOLDEN / "recipes").glob("*.yaml"))


def load(file, name):
    tensors = load_file(GOLDEN / file)
    return {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_agrees_with_mergekit(path):
    """Both round in float32, some ten operations each: 16 roundings of the largest element."""
    recipe = read_recipe(path)
    names = map(str, recipe.references())
    sources = {name: MemorySource(load("models.safetensors", name), name) for name in names}
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    expected = load("merged.safetensors", path.stem)
    ours = dict(execute(plan, sources, StatisticsCache()))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        limit = 16 * 2.0**-24 * tensor.abs().max()
        assert (ours[name] - tensor).abs().max() <= limit, name


def test_every_method_has_a_recipe():
    assert {read_recipe(path).merge_method for path in RECIPES} == set(METHODS)
