"""The `space:` section: which parameters of the merge vary, over what range, for which tensors."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from evomerge.config.strict import StrictModel, one_or_many

# the strict reader drops names in brackets from locations, so users never see these two pairs
_WORD, _RULE = "(word)", "(rule)"
_ONE, _LIST = "(one)", "(list)"


class LayerScope(StrictModel):
    """How a parameter varies over the depth of the model. Exactly one of the fields is given."""

    every: int | None = Field(None, ge=1)
    """One value for every so many layers; the last group may be smaller."""

    curve: int | None = Field(None, ge=2)
    """A layer curve with so many knots, evenly from the first layer to the last, linear between."""

    groups: tuple[tuple[int, int], ...] | None = Field(None, min_length=1)
    """One value for each range `[first, last]` of layers, both included, counted from 0."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "LayerScope":
        given = [name for name in ("every", "curve", "groups") if getattr(self, name) is not None]
        if len(given) != 1:
            came = " and ".join(given) or "none of them"
            raise ValueError(f"came {came}, exactly one of every, curve, groups is needed.")
        return self


def _scope_form(value: Any) -> str:
    return _RULE if isinstance(value, dict | LayerScope) else _WORD


Scope = Annotated[
    Annotated[Literal["global", "per_layer"], Tag(_WORD)] | Annotated[LayerScope, Tag(_RULE)],
    Discriminator(_scope_form),
]
"""`global`, `per_layer`, or a mapping with `every`, `curve` or `groups`."""


def _every_tensor_is_none(value: Any) -> Any:
    return None if value == "*" else value


class SpaceEntry(StrictModel):
    """One searched parameter, or the part of it that governs some tensors or parents."""

    search: tuple[float, float] | None = None
    """Lowest and highest value; None is the method's own search range. At most six decimals."""

    scale: Literal["linear", "log"] = "linear"
    """How the range is walked; `log` needs a lowest value above 0."""

    kind: Literal["float", "int"] | None = None
    """None is the parameter's own kind."""

    choices: tuple[bool | int | float, ...] | None = Field(None, min_length=2)
    """The values to choose from, instead of a range."""

    scope: Scope = "global"
    """How the value varies over the layers."""

    filter: Annotated[str | None, BeforeValidator(_every_tensor_is_none)] = Field(
        None, min_length=1
    )
    """Part of tensor names; None (or `*`) is all tensors. The first entry that matches governs."""

    models: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the parents whose value varies; None is all. Only for parameters per parent."""

    outside: Literal["own", "tied"] | None = None
    """Embeddings, final norm and head under a layer-wise scope: `own` gives each a knob; `tied`
    takes the first layer's knob for embeddings, the last layer's for norm and head. None is for
    entries that govern no such tensor."""

    initial: bool | float | None = None
    """Start value; None is the middle of the range, for `weight` 1 / number of parents."""

    sigma: float | None = Field(None, gt=0.0, le=1.0)
    """First step as a share of the range; None is `proposer.sigma`, for whole numbers and choices
    at least half a value's share."""

    @field_validator("search")
    @classmethod
    def _not_empty(cls, search: tuple[float, float] | None) -> tuple[float, float] | None:
        if search is not None and search[0] >= search[1]:
            hint = (
                "Fix the parameter in merge.parameters instead."
                if search[0] == search[1]
                else "Write the smaller number first."
            )
            raise ValueError(f"{list(search)} is empty. {hint}")
        return search

    @field_validator("choices")
    @classmethod
    def _only_choices(
        cls, choices: tuple[bool | int | float, ...] | None, info: ValidationInfo
    ) -> tuple[bool | int | float, ...] | None:
        if choices is None:
            return None
        for name in ("search", "kind"):
            if info.data.get(name) is not None:
                raise ValueError(f"stands beside {name}. Keep one of the two.")
        if info.data.get("scale") == "log":
            raise ValueError("stands beside scale: log. Remove the scale.")
        if len({isinstance(choice, bool) for choice in choices}) > 1:
            raise ValueError(f"{list(choices)} mixes numbers with true and false. Keep one kind.")
        if len(set(choices)) < len(choices):
            raise ValueError(f"{list(choices)} names a value twice. Name each once.")
        return choices

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if models is not None and len(set(models)) < len(models):
            raise ValueError(f"{list(models)} names a parent twice. Name each once.")
        return models

    @field_validator("outside")
    @classmethod
    def _for_layers(
        cls, outside: Literal["own", "tied"] | None, info: ValidationInfo
    ) -> Literal["own", "tied"] | None:
        if outside is not None and info.data.get("scope") == "global":
            raise ValueError("is for layer-wise scopes, and this scope is global. Remove it.")
        return outside


def _entries_form(value: Any) -> str:
    return _LIST if isinstance(value, list | tuple) else _ONE


SpaceEntries = Annotated[
    Annotated[SpaceEntry, Tag(_ONE)]
    | Annotated[tuple[SpaceEntry, ...], Field(min_length=1), Tag(_LIST)],
    Discriminator(_entries_form),
]
"""One entry, or several with filters or parents of their own."""

SpaceConfig = dict[str, SpaceEntries]
"""Name of a method's parameter to what is searched of it."""


def entries_of(entries: SpaceEntry | tuple[SpaceEntry, ...]) -> tuple[SpaceEntry, ...]:
    """Return a parameter's entries as a tuple, also where only one was written."""
    several: tuple[SpaceEntry, ...] = one_or_many(entries)
    return several
