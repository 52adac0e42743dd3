"""Recipe: the concrete, complete description of one merge.

What was scored is this record, and YAML holds the same.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field, model_validator

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.strict import StrictModel
from evomerge.config.tokenizer import TokenizerConfig

Curve = tuple[float, ...]
"""Values spread over the model's depth and interpolated between (mergekit: a gradient)."""


ThresholdTies = Literal["keep", "index", "hash"]
"""Which of the elements that equal the last one kept are kept with it.

`keep` is all of them; `index` exactly as many as the density says, those of the lowest index;
`hash` so many on average, at random by the mask seed.
"""

Rounding = Literal["nearest", "dither"]
"""How float32 results become bfloat16.

`nearest`, or `dither`: up or down at random by the mask seed, with the chances that make the mean
right.
"""


class Rule(StrictModel):
    """A value for the tensors whose name contains `filter`; the first rule that matches wins."""

    filter: str | None = None
    """Part of the tensor's name; None (or `*`) matches every tensor."""

    value: float | bool | Curve
    """One number or switch, or a layer curve."""

    def matches(self, tensor: str) -> bool:
        """Whether the rule applies to the tensor of this name."""
        return self.filter in (None, "*") or str(self.filter) in tensor


Setting = float | bool | Curve | tuple[Rule, ...]
"""What a parameter is set to: a number or switch, a layer curve, or rules by tensor name."""


class Source(StrictModel):
    """A model that goes into the merge, with its own parameters."""

    model: ModelRef
    parameters: dict[str, Setting] = Field(default_factory=dict)


def _forwards(layers: tuple[int, int]) -> tuple[int, int]:
    first, end = layers
    if not 0 <= first < end:
        raise ValueError(
            f"came [{first}, {end}]; the first layer, from 0, and the one after the last are "
            "needed, as in [0, 8]."
        )
    return layers


LayerRange = Annotated[tuple[int, int], AfterValidator(_forwards)]
"""First layer, from 0, and the one after the last."""


class SliceSource(StrictModel):
    """Layers of a model that go into a slice, with its own parameters."""

    model: ModelRef
    layer_range: LayerRange
    parameters: dict[str, Setting] = Field(default_factory=dict)


class _Ranged(Protocol):
    model: ModelRef
    layer_range: tuple[int, int]


Ranged = TypeVar("Ranged", bound=_Ranged)


def of_one_depth(sources: tuple[Ranged, ...]) -> tuple[Ranged, ...]:
    """Refuse the sources of a slice that give different numbers of layers, or none at all."""
    depths = [source.layer_range[1] - source.layer_range[0] for source in sources]
    if len(set(depths)) != 1:
        given = [f"{s.model} gives {depth}" for s, depth in zip(sources, depths, strict=True)]
        raise ValueError(
            "the sources of a slice must give the same number of layers, and "
            f"{', '.join(given) or 'none came'}. Make each layer_range as long as the others."
        )
    return sources


class Slice(StrictModel):
    """A run of layers of the merge: the first of each source merged, then the second, and so on."""

    sources: Annotated[tuple[SliceSource, ...], AfterValidator(of_one_depth)]
    """Models in the order in which they are summed; all give the same number of layers."""

    base_model: ModelRef | None = None
    """Stands for the recipe's base model here."""

    parameters: dict[str, Setting] = Field(default_factory=dict)
    """Parameters of this slice, between its sources' own and the recipe's."""

    @property
    def num_layers(self) -> int:
        """How many layers of the merge it makes."""
        first, end = self.sources[0].layer_range
        return end - first


class Recipe(StrictModel):
    """One merge, ready to be carried out; `config/mergekit.py` prints it for mergekit to replay.

    It merges whole models (`models`), or stacks layers (`slices`).
    """

    merge_method: str
    models: tuple[Source, ...] = ()
    """Models in the order in which they are summed; empty where there are slices."""

    slices: tuple[Slice, ...] = ()
    """The layers of the merge from the first on.

    What lies before the layers (embeddings) is merged as the first slice says, norm and head as the
    last.
    """

    base_model: ModelRef | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    """Parameters shared by all models; also the fallback of the slices' and models' own."""

    dtype: DtypeName | None = None
    """mergekit's arithmetic dtype; it counts only where `out_dtype` is None.

    evomerge always computes in float32.
    """

    out_dtype: DtypeName | None = None
    """Dtype of the merged tensors; None is `dtype`, or the base's where that is None too."""

    tokenizer_source: str | None = None
    """`base`, `union`, or the model whose tokenizer the merge takes; None copies the base's (or
    first model's) and aligns nothing."""

    tokenizer: TokenizerConfig | None = None
    """The vocabulary of the merge in detail; stands in place of `tokenizer_source`."""

    chat_template: str | None = None
    """`auto`, a name, or the template itself; None keeps that of the tokenizer."""

    mask_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the random masks (DARE, DELLA), of `hash` and of `dither`; else without meaning."""

    threshold_ties: ThresholdTies = "keep"
    """Only for methods that keep elements down to a magnitude (TIES, breadcrumbs)."""

    rounding: Rounding = "nearest"
    """`dither` only where merged tensors are bfloat16; those in float32 are not rounded."""

    @model_validator(mode="after")
    def _one_form(self) -> "Recipe":
        if bool(self.models) == bool(self.slices):
            came = "both" if self.models else "neither"
            raise ValueError(f"one of models and slices is needed, and {came} came.")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError(
                "tokenizer and tokenizer_source are both given. Keep tokenizer, and write the "
                "other as its source."
            )
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form, in hexadecimal; recipes of one hash are the same merge."""
        fields = self.model_dump(mode="json")
        # so that a field of a later version changes no hash as long as it says nothing
        unsaid = {name: Recipe.model_fields[name].default for name in _LATER_FIELDS}
        fields = {k: v for k, v in fields.items() if k not in unsaid or (v and v != unsaid[k])}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sources(self) -> Sequence[Source | SliceSource]:
        """The listed models with their own parameters, of all slices where there are some."""
        return self.models or [source for part in self.slices for source in part.sources]

    @property
    def donor(self) -> ModelRef:
        """The model whose config, and tokenizer unless told otherwise, the merge takes."""
        return self.base_model or self.sources[0].model

    def references(self) -> tuple[ModelRef, ...]:
        """Return every model the merge reads, base first, each once."""
        bases = [self.base_model, *(part.base_model for part in self.slices)]
        listed = [source.model for source in self.sources]
        return tuple(dict.fromkeys([*(base for base in bases if base), *listed]))


_LATER_FIELDS = ("slices", "tokenizer", "chat_template", "threshold_ties", "rounding")
