"""Baselines: what every search is measured against, as recipes. They are a study's first trials."""

from collections.abc import Mapping

from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Source
from evomerge.study.records import TrialRecord
from evomerge.study.setup import Setup

SOUP = "greedy_soup"
"""Name of the baseline that the soup's steps lead to."""

STEP = "greedy:"
"""What the names of the soup's steps begin with; the number of parents tried before follows."""


def baseline_recipes(setup: Setup) -> dict[str, Recipe]:
    """Return the baselines that need no scores, by name.

    They are `base`, `parent:NAME` for each parent, and `uniform`, the mean of the parents.
    """
    models = setup.config.models
    recipes = {"base": _alone(setup, models.base)}
    recipes |= {f"parent:{name}": _alone(setup, ref) for name, ref in models.parents.items()}
    return {**recipes, "uniform": _mean(setup, list(models.parents))}


def next_of_soup(setup: Setup, baselines: Mapping[str, TrialRecord]) -> tuple[str, Recipe] | None:
    """Return the next baseline on the way to the greedy soup; None once the soup is scored.

    Parents are tried from the best to the worst; each stays in the mean if the search score does
    not drop (Wortsman 2022, https://arxiv.org/abs/2203.05482, section 2.2). A function of recorded
    scores alone, so that a resumed study takes the same steps. A mean that some baseline has
    scored already is no step of its own.

    Args:
        setup: The search.
        baselines: Those known so far, all of them scored, `baseline_recipes` among them.
    """
    if SOUP in baselines:
        return None
    fitness = {record.recipe.hash: _fitness(record) for record in baselines.values()}
    parents = {name: _fitness(baselines[f"parent:{name}"]) for name in setup.config.models.parents}
    # sorting is stable: of equals, the one named first
    first, *others = sorted(parents, key=lambda name: -parents[name])
    chosen, best = [first], parents[first]
    for step, name in enumerate(others, start=1):
        recipe = _mean(setup, [*chosen, name])
        if recipe.hash not in fitness:
            return f"{STEP}{step}", recipe
        if fitness[recipe.hash] >= best:
            chosen, best = [*chosen, name], fitness[recipe.hash]
    if len(chosen) == 1:
        return SOUP, _alone(setup, setup.config.models.parents[first])
    return SOUP, _mean(setup, chosen)


def _fitness(record: TrialRecord) -> float:
    assert record.result is not None, "a step follows from scores"
    assert record.result.fitness is not None, "a baseline without a score ends the study"
    return record.result.fitness


def _alone(setup: Setup, model: ModelRef) -> Recipe:
    return _recipe(setup, "passthrough", [model], {})


def _mean(setup: Setup, names: list[str]) -> Recipe:
    """Return the mean of some parents, in the config's order: one mean is one recipe."""
    models = [ref for name, ref in setup.config.models.parents.items() if name in names]
    return _recipe(setup, "linear", models, {"weight": 1.0})


def _recipe(
    setup: Setup, method: str, models: list[ModelRef], parameters: dict[str, float]
) -> Recipe:
    sources = tuple(Source(model=model, parameters=dict(parameters)) for model in models)
    return Recipe(
        merge_method=method,
        models=sources,
        dtype="float32",
        out_dtype=setup.out_dtype,
        tokenizer_source=str(setup.config.tokenizer_model),
    )
