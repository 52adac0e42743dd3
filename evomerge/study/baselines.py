"""Baselines: what every search is measured against, as recipes. They are a study's first trials."""

from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Source
from evomerge.study.setup import Setup


def baseline_recipes(setup: Setup) -> dict[str, Recipe]:
    """Return the baselines by name.

    They are `base`, `parent:NAME` for each parent, and `uniform`, the mean of the parents.
    """
    models = setup.config.models
    recipes = {"base": _alone(setup, models.base)}
    recipes |= {f"parent:{name}": _alone(setup, ref) for name, ref in models.parents.items()}
    uniform = _recipe(setup, "linear", list(models.parents.values()), {"weight": 1.0})
    return {**recipes, "uniform": uniform}


def _alone(setup: Setup, model: ModelRef) -> Recipe:
    return _recipe(setup, "passthrough", [model], {})


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
