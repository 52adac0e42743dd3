"""Models of a few small tensors in memory, and recipes over them."""

import torch

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import parse_recipe
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import merged_tensors
from evomerge.merging.plan import make_plan

SHAPES = {
    "model.embed_tokens.weight": (16, 6),
    **{f"model.layers.{i}.mlp.up_proj.weight": (10, 6) for i in range(3)},
    **{f"model.layers.{i}.input_layernorm.weight": (6,) for i in range(3)},
    "model.norm.weight": (6,),
    "lm_head.weight": (16, 6),
}


def make_tensors(seed, dtype=torch.float32):
    """Tensors of a model; all models share a base of seed 0."""
    tensors = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.1
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        tensors[name] = (tensor + (0.01 if seed else 0.0) * noise).to(dtype)
    return tensors


def make_sources(dtype=torch.float32, **changes):
    """Sources `base`, `a`, `b`; a change maps a model's name to tensors put over its own.

    A tensor that is None is left out.
    """
    sources = {}
    for seed, label in enumerate(("base", "a", "b")):
        tensors = {**make_tensors(seed, dtype), **changes.get(label, {})}
        sources[label] = MemorySource(
            {name: tensor for name, tensor in tensors.items() if tensor is not None}, label
        )
    return sources


TASK_ARITHMETIC = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.25}}
"""


def plan_of(text, sources):
    """The plan of a recipe over sources."""
    recipe = parse_recipe(text)
    return make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))


def merged(text, sources, statistics=None):
    """The tensors of a recipe carried out."""
    cache = statistics or StatisticsCache()
    return merged_tensors(plan_of(text, sources), sources, cache)
