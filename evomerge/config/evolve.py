"""A genome file of mergekit-evolve 0.1.5: its fields and defaults, read strictly.

What becomes of it is in `evolve_import.py`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from evomerge.config.models import ModelRef
from evomerge.config.strict import Origin, StrictModel, read_yaml, validate

_PARAMETERS = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}


class GenomeConfig(StrictModel):
    """What mergekit-evolve varies, by its names."""

    models: tuple[ModelRef, ...] = Field(min_length=1)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: ModelRef | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    """Layers that share their values; below 1 all do."""

    normalize: bool | None = None
    """None is true for linear, ties and dare_ties."""

    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    """Parts of tensor names with values of their own; all other tensors share one more set."""

    smooth: bool = False
    """Interpolate between the values of layer groups."""

    @model_validator(mode="after")
    def _consistent(self) -> "GenomeConfig":
        names = [str(model) for model in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"{twice} stands twice under models. Name each model once.")
        if self.merge_method == "slerp":
            self._check_slerp()
        elif self.merge_method != "linear" and self.base_model is None:
            raise ValueError(f"{self.merge_method} needs a base_model. Add it.")
        return self

    def _check_slerp(self) -> None:
        if self.smooth or self.filters:
            raise ValueError("slerp takes neither smooth nor filters. Remove them.")
        if len(self.models) != 2:
            raise ValueError(
                f"slerp came with {len(self.models)} models. mergekit-evolve picks two of them "
                "anew for every layer group, which no search here can follow; keep two."
            )
        if self.base_model not in (None, *self.models):
            raise ValueError(
                f"slerp goes between the two models, and base_model {self.base_model} would be a "
                "third. Remove it."
            )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The searched parameters of the method."""
        return _PARAMETERS[self.merge_method]

    @property
    def normalized(self) -> bool:
        """Whether the sum is divided by that of the weights."""
        if self.normalize is None:
            return self.merge_method in ("linear", "ties", "dare_ties")
        return self.normalize

    @property
    def parents(self) -> tuple[ModelRef, ...]:
        """The models whose values matter: slerp starts at its first, task vectors at the base."""
        if self.merge_method == "slerp":
            return self.models[1:]
        if self.merge_method == "linear":
            return self.models
        return tuple(model for model in self.models if model != self.base_model)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EvolveTask(StrictModel):
    """A task; a bare text is its name."""

    name: str
    weight: float = 1.0
    """A negative weight is for metrics where lower is better."""

    metric: str = "acc,none"


class EvolveConfig(StrictModel):
    """A whole file of mergekit-evolve."""

    genome: GenomeConfig
    tasks: tuple[Annotated[EvolveTask, BeforeValidator(_named)], ...] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    """The first so many items of each task; None is all."""

    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    """Start at random instead of at the even mix."""

    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True

    def placed(self, folder: Path) -> "EvolveConfig":
        """Return the same with relative paths of local models read from a folder."""
        genome = self.genome
        source = genome.tokenizer_source
        if source not in (None, "base", "union"):
            source = str(ModelRef.model_validate(source).relative_to(folder))
        update = {
            "base_model": genome.base_model and genome.base_model.relative_to(folder),
            "models": tuple(model.relative_to(folder) for model in genome.models),
            "tokenizer_source": source,
        }
        return self.model_copy(update={"genome": genome.model_copy(update=update)})


def read_evolve(path: str | Path) -> tuple[EvolveConfig, Origin]:
    """Read a genome file, and the line of every field.

    Raises:
        ConfigError: One line for every problem, with file, line and field.
    """
    data, origin = read_yaml(path)
    return validate(EvolveConfig, data, origin), origin
