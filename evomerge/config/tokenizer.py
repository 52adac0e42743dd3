"""The `tokenizer:` section of a merge: which vocabulary it has, and where each token's row is from.

The words are mergekit's (its docs/tokenizer.md), so that its files are read as they are.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from evomerge.config.models import ModelRef
from evomerge.config.strict import StrictModel


class ModelToken(StrictModel):
    """The row that a token, or a token number, has in one model. One of the two is given."""

    kind: Literal["model_token"]
    model: ModelRef
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> "ModelToken":
        if (self.token is None) == (self.token_id is None):
            raise ValueError("exactly one of token and token_id is needed.")
        return self


class ZeroRow(StrictModel):
    """A row of zeros."""

    kind: Literal["zero"]


def _source_form(value: Any) -> str:
    if isinstance(value, ModelToken | ZeroRow):
        return f"({value.kind})"
    kind = value.get("kind") if isinstance(value, dict) else None
    return f"({kind})" if kind in ("model_token", "zero") else "(model)"


TokenSource = Annotated[
    Annotated[ModelRef, Tag("(model)")]
    | Annotated[ModelToken, Tag("(model_token)")]
    | Annotated[ZeroRow, Tag("(zero)")],
    Discriminator(_source_form),
]
"""A model (its row of the same token), a row of one model by token or number, or zeros."""


class TokenConfig(StrictModel):
    """Where one token's rows come from."""

    source: TokenSource | None = None
    """None: each model's own row, where it lacks the token what `merging/vocabulary.py` says."""

    force: bool = False
    """Whether every model gets the source's row, those that have the token too."""

    @model_validator(mode="after")
    def _force_what(self) -> "TokenConfig":
        if self.force and self.source is None:
            raise ValueError("force is true without a source. Name the source to be forced.")
        return self


class TokenizerConfig(StrictModel):
    """The vocabulary of a merge."""

    source: str = "union"
    """`union` of all models' vocabularies, `base`, or a model."""

    tokens: dict[str, TokenConfig] = Field(default_factory=dict)
    """Tokens whose rows do not come from where they would by default."""

    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Rows are added until their number is a multiple of this; None adds none."""
