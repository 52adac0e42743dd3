"""AbstractProposer: ask for candidates, tell how good they were; and replay of a log of both."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import StudyError

Vector = NDArray[np.float64]
"""A number in [0, 1] for each knob; float64, shape (size,)."""

TOLERANCE = 1e-6
"""Largest difference between a replayed and a recorded number. On other processors and with other
numbers of threads, full CMA moved by up to 1.2e-9 over 800 evaluations with recorded losses."""


class AbstractProposer(ABC):
    """Proposes candidates, and learns from how good they were.

    What it asks follows from its specification and the asks and tells so far, in their order; never
    from the clock, global random state, hash seed or number of workers. So a search is continued by
    `replay`, without saved state. Asks and tells may alternate in any way; each ask is told at most
    once. Losses: lower is better; the driver tells failed candidates a finite loss too.

    Attributes:
        size: Number of knobs.
        generation: Candidates to ask for before they are told, where one waits for them all.
        num_asks: Asks so far.
        num_tells: Tells so far.
    """

    def __init__(self, size: int, generation: int) -> None:
        self.size = size
        self.generation = generation
        self.num_asks = 0
        self.num_tells = 0
        self._open: set[int] = set()

    def ask(self) -> Vector:
        """Return a new candidate; its id is the number of asks before it."""
        ask_id = self.num_asks
        vector = self._ask(ask_id)
        assert vector.shape == (self.size,), f"ask {ask_id} has shape {vector.shape}"
        assert bool(np.all((vector >= 0.0) & (vector <= 1.0))), (
            f"ask {ask_id} leaves [0, 1]: {vector}"
        )
        self._open.add(ask_id)
        self.num_asks += 1
        return vector

    def tell(self, ask_id: int, loss: float) -> None:
        """Take in the loss of a candidate that was asked for and not told yet.

        Args:
            ask_id: Number of asks that came before it.
            loss: Finite; lower is better.
        """
        assert ask_id in self._open, f"ask {ask_id} was never made, or told before"
        assert math.isfinite(loss), f"ask {ask_id} was told {loss}"
        self._open.remove(ask_id)
        self._tell(ask_id, loss)
        self.num_tells += 1

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return as plain data what, besides the log, decides what is asked."""

    def mean(self) -> Vector | None:
        """Return the centre of what would be asked next; None for proposers that have none."""
        return None

    @abstractmethod
    def _ask(self, ask_id: int) -> Vector:
        """Return a new candidate, and keep what `_tell` will need under its id."""

    @abstractmethod
    def _tell(self, ask_id: int, loss: float) -> None:
        """Take in a loss. Called once for an ask, in any order of asks."""


def replay(
    proposer: AbstractProposer,
    asks: Sequence[tuple[int, Sequence[float]]],
    tells: Sequence[tuple[int, float]],
) -> None:
    """Feed a fresh proposer the log of a study, so that it goes on where that one stood.

    Args:
        proposer: Made from the same specification, not asked yet.
        asks: For each ask in order: the number of tells before it, and the recorded vector.
        tells: For each tell in order: the id of the ask, and the loss.

    Raises:
        StudyError: A replayed ask differs from the recorded vector.
    """
    assert proposer.num_asks == 0, "only a fresh proposer can replay"
    told = 0
    for ask_id, (after, recorded) in enumerate(asks):
        for known, loss in tells[told:after]:
            proposer.tell(known, loss)
        told = max(told, after)
        _compare(ask_id, proposer.ask(), np.asarray(recorded, dtype=np.float64))
    for known, loss in tells[told:]:
        proposer.tell(known, loss)


def _compare(ask_id: int, replayed: Vector, recorded: Vector) -> None:
    if recorded.shape != replayed.shape:
        raise StudyError(
            f"ask {ask_id}: the log has {recorded.size} knobs, the proposer {replayed.size}. "
            "Continue the study with the config it was started with."
        )
    worst = int(np.argmax(np.abs(replayed - recorded)))
    if not abs(replayed[worst] - recorded[worst]) <= TOLERANCE:
        raise StudyError(
            f"ask {ask_id}: the proposer gives {replayed[worst]:.9f} for knob {worst}, the log has "
            f"{recorded[worst]:.9f}. Most likely a library has changed: install the versions "
            "recorded with the study (nevergrad, cma, numpy)."
        )
