"""A genome file of mergekit-evolve as the text of a search config that means the same.

What could not stay the same is said in the text's comments.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.config.evolve import EvolveConfig, EvolveTask, GenomeConfig
from evomerge.config.layout import Layout, Role
from evomerge.config.models import ModelRef
from evomerge.config.search import BASE
from evomerge.config.strict import Origin, parse_yaml
from evomerge.errors import ConfigError

_SIGMA = 1 / 6  # mergekit-evolve's first step, in units of the genes
_BENCHMARKS = (
    *("agieval", "ai2_arc", "arc_", "bigbench", "gsm8k", "hellaswag", "hendrycks"),
    *("leaderboard", "mmlu", "openbookqa", "piqa", "truthfulqa", "winogrande"),
)


@dataclass(frozen=True)
class Shape:
    """The tensors of the models.

    Attributes:
        layout: Layers, and the tensors outside them.
        tensors: Names of all tensors.
        assumed: Whether the names are a guess, because the models are not here.
    """

    layout: Layout
    tensors: tuple[str, ...]
    assumed: bool = False


@dataclass(frozen=True)
class Run:
    """What mergekit-evolve takes on its command line, and a search config holds.

    Attributes:
        name: Of the study.
        evaluations: Candidates to score.
        seconds: Wall time, or None.
        include_path: Folders with task files.
        base: A base for a genome that has none.
    """

    name: str
    evaluations: int = 100
    seconds: float | None = None
    include_path: tuple[str, ...] = ()
    base: ModelRef | None = None


def llama_shape(num_layers: int) -> Shape:
    """Return the tensors of a Llama, as a guess for models that are not here."""
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    norms = ("input_layernorm", "post_attention_layernorm")
    outside: tuple[tuple[Role, str], ...] = (
        ("embed", "model.embed_tokens.weight"),
        ("norm", "model.norm.weight"),
        ("head", "lm_head.weight"),
    )
    layers = [
        f"model.layers.{layer}.{part}.weight"
        for layer in range(num_layers)
        for part in (*inside, *norms)
    ]
    names = (*layers, *(name for _, name in outside))
    return Shape(Layout(num_layers=num_layers, outside=outside), names, assumed=True)


def import_genome(evolve: EvolveConfig, origin: Origin, shape: Shape | None, run: Run) -> str:
    """Return the text of the search config.

    Args:
        evolve: The genome file; paths of local models are absolute.
        origin: Its lines.
        shape: Tensors of the models; None where they are not known, which only a genome without
            layer groups can do without.
        run: The rest of a search.

    Raises:
        ConfigError: The file asks for what no search config can say.
    """
    genome = evolve.genome
    base = _base_of(genome, origin, run)
    names = _parent_names(genome.parents)
    groups = _num_groups(genome, origin, shape)
    if not names:
        place = origin.at("genome", "models")
        raise ConfigError(f"{place}: only the base model came. Add a model to merge into it.")
    lines = [
        "# By evomerge import from a genome file of mergekit-evolve; comments say what differs.",
        "",
        *_study(run),
        *_models(genome, base, names),
        *_merge(genome, origin, names),
        *_space(genome, shape, groups),
        *_suite(evolve, run),
        *_proposer(evolve, groups),
    ]
    return "\n".join(lines) + "\n"


def _base_of(genome: GenomeConfig, origin: Origin, run: Run) -> ModelRef:
    base = genome.models[0] if genome.merge_method == "slerp" else genome.base_model or run.base
    if genome.merge_method == "linear" and base in (None, *genome.models):
        base = run.base
    if base is None or base in genome.parents:
        raise ConfigError(
            f"{origin.at('genome', 'base_model')}: a search is measured against a base, and linear "
            "merges every model here. Name another model of this shape with --base, e.g. the one "
            "these were fine-tuned from; it is not merged."
        )
    return base


def _parent_names(parents: Sequence[ModelRef]) -> dict[str, ModelRef]:
    """Return each parent under a short name made of its path."""
    names: dict[str, ModelRef] = {}
    for parent in parents:
        path = (parent.adapter or parent).path
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.rstrip("/").rpartition("/")[2]).strip("-")
        stem = "parent" if stem in ("", BASE) else stem
        number = next(n for n in range(1, len(parents) + 2) if _numbered(stem, n) not in names)
        names[_numbered(stem, number)] = parent
    return names


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def _num_groups(genome: GenomeConfig, origin: Origin, shape: Shape | None) -> int:
    size = genome.layer_granularity
    if size < 1:
        return 1
    place = origin.at("genome", "layer_granularity")
    if shape is None:
        raise ConfigError(
            f"{place}: the number of layers is needed, and the models are not on this machine. "
            "Give it with --layers."
        )
    if shape.layout.num_layers % size:
        raise ConfigError(
            f"{place}: came {size}, the models have {shape.layout.num_layers} layers. Write a "
            "number that divides them."
        )
    return shape.layout.num_layers // size


def _study(run: Run) -> Iterator[str]:
    budget: dict[str, Any] = {"evaluations": run.evaluations}
    if run.seconds is not None:
        budget["seconds"] = run.seconds
    yield "study:"
    yield f"  name: {_text(run.name)}"
    yield f"  folder: {_text(f'runs/{run.name}')}  # relative to this file"
    yield "  seed: 0  # mergekit-evolve seeds no optimiser, so its searches cannot be repeated"
    yield "  # the options --max-fevals and --timeout of mergekit-evolve; baselines come on top"
    yield f"  budget: {_text(budget)}"
    yield ""


def _models(genome: GenomeConfig, base: ModelRef, names: dict[str, ModelRef]) -> Iterator[str]:
    yield "models:"
    if genome.merge_method == "linear":
        yield "  # measured against, not merged"
    elif genome.merge_method == "slerp":
        yield "  # t goes from the base to the other model"
    elif base in genome.models:
        yield "  # as one of the models it had genes that changed nothing; they are left out"
    yield f"  base: {_text(str(base))}"
    yield "  parents:"
    for name, parent in names.items():
        yield f"    {name}: {_text(str(parent))}"
    yield ""


def _merge(genome: GenomeConfig, origin: Origin, names: dict[str, ModelRef]) -> Iterator[str]:
    yield "merge:"
    yield f"  method: {genome.merge_method}"
    if genome.merge_method != "slerp":
        yield "  # mergekit-evolve also sets int8_mask, which changes no number"
        yield f"  parameters: {{normalize: {_text(genome.normalized)}}}"
    if genome.merge_method in ("linear", "slerp"):
        yield "  # computed in float32 and rounded once, as mergekit does for this method"
    else:
        yield "  # computed in float32 and rounded once; mergekit-evolve computes in bfloat16"
    yield "  out_dtype: bfloat16"
    yield from _tokenizer(genome, origin, names)
    yield ""


def _tokenizer(genome: GenomeConfig, origin: Origin, names: dict[str, ModelRef]) -> Iterator[str]:
    source, base = genome.tokenizer_source, genome.base_model
    if source in (None, BASE) and base is not None:
        source = str(base)
    known = {str(ref): name for name, ref in names.items()}
    if source in known:
        yield f"  tokenizer: {known[source]}"
    elif source == "union":
        yield "  # the union of equal vocabularies is the base's; evomerge check refuses others"
        yield "  tokenizer: base"
    elif source is None:
        yield "  # mergekit takes that of any one of the models here, and not always the same"
        yield f"  tokenizer: {next(iter(names))}"
    elif source in (str(base), str(genome.models[0])):
        yield "  tokenizer: base"
    else:
        raise ConfigError(
            f"{origin.at('genome', 'tokenizer_source')}: came {source!r}, allowed is base, union, "
            "or a model of this genome. Name one of them."
        )


def _space(genome: GenomeConfig, shape: Shape | None, groups: int) -> Iterator[str]:
    yield "space:"
    if shape is not None and shape.assumed:
        yield "  # the models are not here, so names of tensors were taken to be Llama's"
    if genome.merge_method == "slerp":
        yield "  # mergekit-evolve has a gene for each model: t is the smaller one's softmax, and"
        yield "  # goes from the other model. Here t goes all the way, which are the same merges."
    elif not genome.allow_negative_weights:
        yield "  # mergekit-evolve takes magnitudes, here weights have bounds: a fold is invisible"
        yield "  # to the optimiser. Widen the range where the winner lies at its end."
    if genome.smooth and groups > 1:
        yield "  # final norm and head take the last knot's value; mergekit gives them the first's"
    for parameter in genome.parameters:
        if parameter == "density":
            yield "  # bounds in place of a clamped magnitude"
        yield f"  {parameter}:"
        for entry in _entries(genome, parameter, shape, groups):
            if isinstance(entry, str):
                yield f"    # {entry}"
            else:
                yield f"    - {_text(entry)}"
    yield ""


def _entries(
    genome: GenomeConfig, parameter: str, shape: Shape | None, groups: int
) -> Iterator[dict[str, Any] | str]:
    """Yield an entry of the space for each filter and the rest, or why it is left out."""
    free = shape.tensors if shape else ()
    for part in (*(genome.filters or ()), None):
        governed = tuple(name for name in free if part is None or part in name)
        free = tuple(name for name in free if name not in governed)
        if shape is not None and not governed:
            yield f"{_text(part or 'the rest')}: left out, there is no such tensor"
            continue
        entry: dict[str, Any] = {} if part is None else {"filter": part}
        entry |= _range(genome, parameter)
        if shape is not None and groups > 1:
            entry |= _scope(genome, governed, shape.layout, groups)
        yield entry


def _range(genome: GenomeConfig, parameter: str) -> dict[str, Any]:
    """Return range, start and first step; the last as a share of the range."""
    if parameter == "t":
        # half of 1 + tanh of half the difference of two genes, near 0
        return {"search": [0.0, 1.0], "initial": 0.5, "sigma": round(_SIGMA * math.sqrt(2) / 4, 6)}
    low, high, start = 0.0, 1.0, 1.0
    if parameter == "weight":
        start = round(1 / len(genome.models), 6)
        if genome.allow_negative_weights:
            low = -1.0
        elif not genome.normalized:
            high = 1.5
    return {"search": [low, high], "initial": start, "sigma": round(_SIGMA / (high - low), 6)}


def _scope(
    genome: GenomeConfig, governed: Sequence[str], layout: Layout, groups: int
) -> dict[str, Any]:
    """Return how an entry varies over the layers; not at all where it governs none of them."""
    outside = {name for _, name in layout.outside}
    if outside.issuperset(governed):
        return {}
    scope = {"curve": groups} if genome.smooth else {"every": genome.layer_granularity}
    return {"scope": scope, **({"outside": "tied"} if outside.intersection(governed) else {})}


def _suite(evolve: EvolveConfig, run: Run) -> Iterator[str]:
    yield "suite:"
    if run.include_path:
        yield f"  include_path: {_text(list(run.include_path))}"
    yield "  # the weighted mean, which ranks as mergekit-evolve's weighted sum does"
    yield "  tasks:"
    for task in evolve.tasks:
        if task.name.startswith(_BENCHMARKS) and not task.name.endswith("_train"):
            yield "    # a public benchmark: do not report a score on items that were searched on"
        if task.weight < 0:
            yield f"    # weight {task.weight:g}: lower is better"
        yield f"    - {_text(_task(task, evolve.num_fewshot))}"
    yield from _items(evolve)
    chat = {"apply_chat_template": evolve.apply_chat_template}
    if evolve.apply_chat_template:
        chat["fewshot_as_multiturn"] = evolve.fewshot_as_multiturn
    yield f"  chat: {_text(chat)}"
    yield ""


def _task(task: EvolveTask, num_fewshot: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"task": task.name, "metric": task.metric.removesuffix(",none")}
    if task.weight != 1.0:
        entry["weight"] = abs(task.weight)
    if task.weight < 0:
        entry["higher_is_better"] = False
    return entry if num_fewshot is None else {**entry, "num_fewshot": num_fewshot}


def _items(evolve: EvolveConfig) -> Iterator[str]:
    if evolve.limit is None:
        yield "  # every item is searched on; give search a count to have some confirm the winner"
        yield "  items: {search: {count: null}, confirm: 0}"
        return
    how = "drawn at random once" if evolve.shuffle else "drawn at random, not the first"
    yield f"  # {evolve.limit} items of each task, {how}; as many others, which the"
    yield "  # search never sees, confirm the winner (confirm: 0 does without)"
    yield f"  items: {{search: {evolve.limit}, confirm: {evolve.limit}}}"


def _proposer(evolve: EvolveConfig, groups: int) -> Iterator[str]:
    genome = evolve.genome
    sets = len(genome.filters or ()) + 1
    genes = groups * len(genome.models) * sets * len(genome.parameters)
    yield f"# the population that CMA-ES takes by itself for the {genes} genes of mergekit-evolve;"
    yield "# its first step, 1/6 of a gene, stands with each parameter as a share of the range"
    if evolve.random_init:
        yield "# random_init: here the start stays at the even mix; write other initials above"
    yield f"proposer: {{name: CMA, population: {4 + int(3 * math.log(genes))}}}"
    yield ""
    yield "# one worker on this machine's CPUs; for GPUs: {pool: ray, count: 1, gpus: 1}"
    yield "workers: {pool: inline}"


def _text(value: Any) -> str:
    """Return plain data as YAML on one line, with quotes only where they are needed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"[\w./][\w./@+-]*", value, re.ASCII)
    return value if plain and parse_yaml(value)[0] == value else json.dumps(value)
