"""Recipe: the concrete, complete description of one merge.

What was scored is this record, and YAML holds the same.
"""

import hashlib
import json
from functools import cached_property

from pydantic import Field

from evomerge.config.models import DtypeName, ModelRef
from evomerge.config.strict import StrictModel

Curve = tuple[float, ...]
"""Values spread over the model's depth and interpolated between (mergekit: a gradient)."""


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


class Recipe(StrictModel):
    """One merge, ready to be carried out; `config/mergekit.py` prints it for mergekit to replay."""

    merge_method: str
    models: tuple[Source, ...] = Field(min_length=1)
    """Models in the order in which they are summed."""

    base_model: ModelRef | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    """Parameters shared by all models; also the fallback of the models' own."""

    dtype: DtypeName | None = None
    """mergekit's arithmetic dtype; it counts only where `out_dtype` is None.

    evomerge always computes in float32.
    """

    out_dtype: DtypeName | None = None
    """Dtype of the merged tensors; None is `dtype`, or the base's where that is None too."""

    tokenizer_source: str | None = None
    """`base`, or the model whose tokenizer the merge takes; None is the base (or first model)."""

    mask_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the random masks (DARE, DELLA); without meaning for other methods."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical form, in hexadecimal; recipes of one hash are the same merge."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def donor(self) -> ModelRef:
        """The model whose config, and tokenizer unless told otherwise, the merge takes."""
        return self.base_model or self.models[0].model

    def references(self) -> tuple[ModelRef, ...]:
        """Return every model the merge reads, base first, each once."""
        found = [self.base_model] if self.base_model else []
        return tuple(dict.fromkeys([*found, *(source.model for source in self.models)]))
