"""What a candidate costs beside the bytes it moves: from the genome to the end of the launch.

    python -m benchmarks.candidate_overhead [--tensors 291] [-n 8] [--rounds 9] [--json]

The models have the tensors of a Llama by name and number, each of a few elements, so that what is
left is work per candidate and per tensor:

- decode: from the genome to the recipe; hash: of the recipe.
- plan: the recipe bound to the models, and checked.
- tables: each tensor's coefficients, thresholds and levels.
- launch: the rest of the merge into memory that is there: packing, kernels, checksums.

Times are CPU milliseconds of this process, medians over rounds, each of another genome. What holds
for the whole search is known from a first candidate. So are the norms that `rescale` divides by:
each candidate has its own, but they take a pass over the data, like the kernels.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from safetensors.torch import save_file

from benchmarks.measure import Row, count, one_thread, parser, show
from evomerge.adapters.open import Model, open_model
from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import hold
from evomerge.config.models import ModelRef
from evomerge.config.space import LayerScope, SpaceEntry
from evomerge.kernels.statistics import TensorStatistics
from evomerge.kernels.tables import KernelTable
from evomerge.merging.bind import ModelSet
from evomerge.merging.execute import Merger, Output, Place
from evomerge.merging.plan import MergePlan, TensorInput, TensorJob
from evomerge.methods import METHODS
from evomerge.seeds import stream_seed
from evomerge.space.decode import RecipeTemplate, decode
from evomerge.space.genome import Genome
from evomerge.space.space import Space, build_space

MATRICES = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
VECTORS = ("input_layernorm", "post_attention_layernorm")
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
PER_LAYER = len(MATRICES) + len(VECTORS)
SIZE = 4
"""Rows and columns of each tensor."""

SPACES: Mapping[str, tuple[str, ...]] = {
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "slerp": ("t",),
    "dare_ties": ("weight", "density"),
    "della": ("weight", "density"),
}
"""What is searched, for every fourth layer and for embeddings, norm and head apart."""

Made = TypeVar("Made")
STEPS = ("decode", "hash", "plan", "tables", "launch")


@dataclass(frozen=True)
class World:
    """A search that stands still.

    Attributes:
        space: Its knobs.
        template: What its recipes share.
        models: Its models, that recipes are bound to.
        merger: The same in memory, with all that candidates share.
        facts: About each tensor.
        out: The live model.
    """

    space: Space
    template: RecipeTemplate
    models: ModelSet
    merger: Merger
    facts: dict[str, TensorStatistics] = field(default_factory=dict)
    out: dict[str, torch.Tensor] = field(default_factory=dict)


def main() -> None:
    """Measure every method and print the rows."""
    arguments = _parser().parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), arguments.n, (arguments.tensors - 3) // PER_LAYER)
        rows = [measured(method, models, arguments.rounds) for method in SPACES]
    show(rows, arguments.json)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__ or "")
    made.set_defaults(rounds=9)
    made.add_argument("--tensors", type=_tensors, default=291, help="3 and 9 for each layer")
    made.add_argument("-n", type=count, default=8, help="parents besides the base (slerp has one)")
    return made


def _tensors(text: str) -> int:
    number = count(text)
    if number <= 3 or (number - 3) % PER_LAYER:
        raise argparse.ArgumentTypeError(f"{text}: must be 3 more than a multiple of {PER_LAYER}")
    return number


def make_models(root: Path, num_parents: int, num_layers: int) -> dict[str, Model]:
    """Write a base and its parents with noise from seeds, and open them."""
    names = [*OUTSIDE]
    for layer in range(num_layers):
        names += [f"model.layers.{layer}.{part}.weight" for part in (*MATRICES, *VECTORS)]
    opened = {}
    for number in range(num_parents + 1):
        folder = root / (f"parent_{number}" if number else "base")
        folder.mkdir()
        tensors = {name: _tensor(name, number) for name in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}")
        opened[str(folder)] = open_model(ModelRef(path=str(folder)))
    return opened


def _tensor(name: str, number: int) -> torch.Tensor:
    shape = (SIZE,) if "norm" in name else (SIZE, SIZE)
    base = 0.02 * torch.randn(shape, generator=_generator(name))
    noise = 0.002 * torch.randn(shape, generator=_generator(name, str(number)))
    return (base + noise if number else base).bfloat16()


def _generator(*names: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(0, *names))


def measured(method: str, models: Mapping[str, Model], num_rounds: int) -> Row:
    """Take a method's candidates through every step, and return the medians."""
    world = make_world(method, models)
    generator = _generator(method)
    size = world.space.size
    units = torch.rand(num_rounds + 1, size, generator=generator, dtype=torch.float64).tolist()
    rounds = [candidate(world, Genome(tuple(each))) for each in units][1:]
    medians = {f"{step}_ms": 1e3 * median(each[step] for each in rounds) for step in STEPS}
    sums = [1e3 * sum(each.values()) for each in rounds]
    before = [1e3 * (sum(each.values()) - each["launch"]) for each in rounds]
    more = {"knobs": size, **medians, "before_launch_ms": median(before), "ms": median(sums)}
    num_parents = len(world.template.parents)
    return Row("candidate overhead", method, num_parents, 1, more=more)


def make_world(method: str, models: Mapping[str, Model]) -> World:
    """Lay out a search over these models; where the method takes one parent, over the first."""
    base, *parents = models
    parents = parents[: METHODS[method].max_parents]
    kept = {name: models[name] for name in (base, *parents)}
    layout = layout_of(models[base].names())
    every = min(4, (layout.num_layers + 1) // 2)
    entry = SpaceEntry(scope=LayerScope(every=every), outside="own")
    named = {Path(parent).name: ModelRef(path=parent) for parent in parents}
    space = build_space(
        dict.fromkeys(SPACES[method], entry),
        {},
        METHODS[method].params,
        list(named),
        layout,
        models[base].names(),
    )
    template = RecipeTemplate(
        method, ModelRef(path=base), tuple(named.items()), out_dtype="bfloat16"
    )
    held = {name: hold(model) for name, model in kept.items()}
    return World(space, template, ModelSet(kept), Merger(held))


def candidate(world: World, genome: Genome) -> dict[str, float]:
    """Return the CPU seconds of each step."""
    recipe, decode_s = timed(lambda: decode(world.space, genome, world.template))
    _, hash_s = timed(lambda: recipe.hash)
    plan, plan_s = timed(lambda: world.models.bind(recipe).plan)
    tables(world, plan)  # norms of this candidate
    _, tables_s = timed(lambda: tables(world, plan))
    _, merge_s = timed(lambda: merge(world, plan))
    return dict(zip(STEPS, (decode_s, hash_s, plan_s, tables_s, merge_s - tables_s), strict=True))


def timed(run: Callable[[], Made]) -> tuple[Made, float]:
    """Return what a call made and the CPU seconds it took."""
    start = time.process_time()
    made = run()
    return made, time.process_time() - start


def tables(world: World, plan: MergePlan) -> list[KernelTable]:
    """Return each tensor's table, from facts that are kept."""
    for job in plan.jobs:
        if job.spec.name not in world.facts:
            world.facts[job.spec.name] = facts_of(world, job)
    return [
        plan.method.table(job.values, world.facts[job.spec.name]) for job in plan.jobs if job.values
    ]


def facts_of(world: World, job: TensorJob) -> TensorStatistics:
    """Return what is known of a tensor's inputs."""
    base_P = None if job.base is None else flat(world, job.base)
    return TensorStatistics(
        job.spec.name,
        base_P,
        [flat(world, source) for source in job.parents],
        None if job.base is None else job.base.model,
        tuple(source.model for source in job.parents),
        world.template.mask_seed,
        world.merger.statistics,
        job.spec.shape,
    )


def flat(world: World, source: TensorInput) -> torch.Tensor:
    """Return the elements of a tensor."""
    return world.merger.sources[source.model].read(source.name).view(-1)


def merge(world: World, plan: MergePlan) -> int:
    """Merge into memory that is there, in one launch; return how many tensors came."""
    output = Output(partial(place, world), 2**40)
    return sum(1 for _ in world.merger.execute(plan, output=output))


def place(world: World, spec: TensorSpec) -> Place:
    """Return a tensor's place, the same for every candidate."""
    if spec.name not in world.out:
        world.out[spec.name] = torch.empty(spec.shape, dtype=spec.dtype)
    return Place(world.out[spec.name], is_new=False)


if __name__ == "__main__":
    main()
