"""The `proposer:` section: what asks for candidates, and how boldly."""

from typing import Literal

from pydantic import Field, JsonValue

from evomerge.config.strict import StrictModel


class ProposerConfig(StrictModel):
    """How candidates are proposed."""

    name: str = "CMA"
    """`CMA`, `DiagonalCMA`, or an optimiser of nevergrad by its name there."""

    population: int = Field(8, ge=2, le=10_000)
    """Candidates of one generation. For CMA also the number it learns from at a time."""

    sigma: float = Field(0.1, gt=0.0, le=1.0)
    """First step as a share of each knob's range. Without meaning for optimisers that start with
    the whole range (DE, PSO, random search)."""

    mode: Literal["sync", "async"] = "sync"
    """`sync` waits for a whole generation; `async` asks whenever a worker is idle."""

    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Options of the optimiser, by nevergrad's names, e.g. `{crossover: twopoints}` for DE."""
