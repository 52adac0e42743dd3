"""Baselines: what every search is measured against, as recipes. They are a study's first trials.

Base and parents are always there; `study.baselines` names the others. All but random search are
scored before the first candidate, on the same items. What of it needs scores first is a function of
recorded scores alone, so that a resumed study goes the same way.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.recipe import Recipe, Setting, Source
from evomerge.config.search import SearchConfig
from evomerge.errors import EvoMergeError
from evomerge.merging.bind import ModelSet
from evomerge.seeds import stream_seed
from evomerge.space.decode import decode
from evomerge.space.genome import Genome
from evomerge.study.records import TrialRecord

if TYPE_CHECKING:
    from evomerge.study.setup import Setup

UNIFORM, SOUP, SWEEP, TIES, STOCK, RANDOM = (
    "uniform",
    "greedy_soup",
    "lambda_sweep",
    "ties",
    "model_stock",
    "random_search",
)
SOUP_STEP = "greedy:"
"""What the names of the soup's steps begin with; the number of parents tried before follows."""

SWEEP_STEP = "lambda:"
"""What the names of the sweep's steps begin with; lambda follows."""

RANDOM_STEP = "random:"
"""What the names of random candidates begin with; their number follows."""

LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Scales of the summed task vectors; with K parents, the mean of the parents is at 1 / K."""

TIES_DENSITY = 0.2
"""Share of each task vector that TIES keeps: what its paper advises where nothing is tuned, with
weights and lambda of 1 (section 4.1). mergekit has no default, and its examples say 0.5."""


def baseline_recipes(setup: "Setup") -> dict[str, Recipe]:
    """Return the baselines that need no scores, by name, in the order in which they are scored.

    They are `base`, `parent:NAME` for each parent, and those of `study.baselines` that are merges
    of these models: `uniform`, the mean of the parents; `lambda:0.2` and on, the base plus the
    parents' task vectors times lambda; `ties`; `model_stock`.
    """
    config, dtype = setup.config, setup.out_dtype
    models = config.models
    recipes = {"base": _recipe(config, dtype, "passthrough", [models.base])}
    for name, model in models.parents.items():
        recipes[f"parent:{name}"] = _recipe(config, dtype, "passthrough", [model])
    for baseline, steps in _asked(config, dtype).items():
        if baseline not in setup.unfit_baselines:
            recipes |= steps
    return recipes


def unfit_baselines(config: SearchConfig, out_dtype: DtypeName, models: ModelSet) -> dict[str, str]:
    """Return why some of `study.baselines` are no merges of these models, by their names.

    Args:
        config: The search.
        out_dtype: Dtype of the merged models.
        models: All models of the search.
    """
    unfit: dict[str, str] = {}
    recipes = _asked(config, out_dtype)
    if SOUP in config.study.baselines:
        recipes[SOUP] = {SOUP: _mean(config, out_dtype, list(config.models.parents))}
    for baseline, steps in recipes.items():
        try:
            for recipe in steps.values():
                models.bind(recipe)
        except EvoMergeError as error:
            unfit[baseline] = str(error).splitlines()[0]
    return unfit


def next_baseline(
    setup: "Setup", baselines: Mapping[str, TrialRecord]
) -> tuple[str, Recipe] | None:
    """Return the next baseline that follows from scores; None once all are known.

    These are the steps of the greedy soup, the soup, and the best of the sweep over lambda.

    Args:
        setup: The search.
        baselines: Those known so far, all of them finished, `baseline_recipes` among them.
    """
    asked = [name for name in setup.config.study.baselines if name not in setup.unfit_baselines]
    if SOUP in asked and SOUP not in baselines:
        return _next_of_soup(setup, baselines)
    if SWEEP in asked and SWEEP not in baselines:
        best = _best_of(SWEEP_STEP, baselines)
        return (SWEEP, best.recipe) if best else None
    return None


def random_recipe(setup: "Setup", number: int) -> Recipe:
    """Return a candidate of random search: uniform over the ranges of the knobs."""
    seed = stream_seed(setup.config.study.seed, "random_search", str(number))
    draw = random.Random(seed)
    units = tuple(draw.random() for _ in setup.space.knobs)
    return decode(setup.space, Genome(units), setup.template)


def num_evaluations(setup: "Setup") -> int:
    """Return how often baselines are scored on all search items, at most; not random search.

    With random search in `study.baselines`, as many more as the search scores candidates.
    """
    recipes, num_parents = baseline_recipes(setup), len(setup.config.models.parents)
    soup = SOUP in setup.config.study.baselines and SOUP not in setup.unfit_baselines
    steps = num_parents - 1 if soup else 0
    if UNIFORM in recipes and num_parents == 2:
        steps = 0  # the mean of two is the uniform one
    return len(recipes) + steps


def main_baselines(baselines: Mapping[str, TrialRecord]) -> dict[str, TrialRecord]:
    """Return the baselines to be shown and confirmed: scored, without steps on the way to others.

    Of random candidates, the best is `random_search`.

    Args:
        baselines: Those of a study, by name.
    """
    steps = (SOUP_STEP, SWEEP_STEP, RANDOM_STEP)
    found = {
        name: record
        for name, record in baselines.items()
        if not name.startswith(steps) and _fitness(record) is not None
    }
    luckiest = _best_of(RANDOM_STEP, baselines)
    return found | ({RANDOM: replace(luckiest, baseline=RANDOM)} if luckiest else {})


def _asked(config: SearchConfig, out_dtype: DtypeName) -> dict[str, dict[str, Recipe]]:
    """Return the recipes of each baseline of the config that needs no scores, in a fixed order."""
    base, parents = config.models.base, list(config.models.parents.values())
    whole: dict[str, Setting] = {"weight": 1.0}
    recipes = {
        UNIFORM: {UNIFORM: _mean(config, out_dtype, list(config.models.parents))},
        SWEEP: {
            f"{SWEEP_STEP}{lam:g}": _recipe(
                config, out_dtype, "task_arithmetic", parents, {"weight": lam}, base
            )
            for lam in LAMBDAS
        },
        TIES: {
            TIES: _recipe(
                config, out_dtype, "ties", parents, {**whole, "density": TIES_DENSITY}, base
            )
        },
        STOCK: {STOCK: _recipe(config, out_dtype, "model_stock", parents, {}, base)},
    }
    return {name: steps for name, steps in recipes.items() if name in config.study.baselines}


def _next_of_soup(setup: "Setup", baselines: Mapping[str, TrialRecord]) -> tuple[str, Recipe]:
    """Return the soup's next step, or the soup.

    Parents are tried from the best to the worst; each stays in the mean if the search score does
    not drop (Wortsman 2022, https://arxiv.org/abs/2203.05482, section 2.2). A mean that some
    baseline has scored already is no step of its own.
    """
    models = setup.config.models.parents
    scores = {record.recipe.hash: _fitness(record) for record in baselines.values()}
    parents = {name: _score(baselines[f"parent:{name}"]) for name in models}
    # sorting is stable: of equals, the one named first
    first, *others = sorted(parents, key=lambda name: -parents[name])
    chosen, best = [first], parents[first]
    for step, name in enumerate(others, start=1):
        recipe = _mean(setup.config, setup.out_dtype, [*chosen, name])
        score = scores.get(recipe.hash)
        if score is None:
            return f"{SOUP_STEP}{step}", recipe
        if score >= best:
            chosen, best = [*chosen, name], score
    if len(chosen) == 1:
        return SOUP, _recipe(setup.config, setup.out_dtype, "passthrough", [models[first]])
    return SOUP, _mean(setup.config, setup.out_dtype, chosen)


def _best_of(step: str, baselines: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """Return the best of the steps of one name, the earliest of equals."""
    scored = [
        record
        for name, record in baselines.items()
        if name.startswith(step) and _fitness(record) is not None
    ]
    return max(scored, key=_score, default=None)


def _fitness(record: TrialRecord) -> float | None:
    return record.result.fitness if record.result else None


def _score(record: TrialRecord) -> float:
    fitness = _fitness(record)
    assert fitness is not None, "a step follows from scores"
    return fitness


def _mean(config: SearchConfig, out_dtype: DtypeName, names: list[str]) -> Recipe:
    """Return the mean of some parents, in the config's order: one mean is one recipe."""
    models = [ref for name, ref in config.models.parents.items() if name in names]
    return _recipe(config, out_dtype, "linear", models, {"weight": 1.0})


def _recipe(
    config: SearchConfig,
    out_dtype: DtypeName,
    method: str,
    models: list[ModelRef],
    parameters: Mapping[str, Setting] | None = None,
    base: ModelRef | None = None,
) -> Recipe:
    sources = tuple(Source(model=model, parameters=dict(parameters or {})) for model in models)
    return Recipe(
        merge_method=method,
        models=sources,
        base_model=base,
        dtype="float32",
        out_dtype=out_dtype,
        tokenizer_source=str(config.tokenizer_model),
    )
