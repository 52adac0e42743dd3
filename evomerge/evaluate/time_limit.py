"""Time limit: ends an evaluation that takes too long, so that no candidate holds a worker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from evomerge.errors import EvaluationError

Clock = Callable[[], float]
"""Seconds, from any zero."""


@contextmanager
def limited(
    model: torch.nn.Module, limit_s: float | None, clock: Clock, where: str
) -> Iterator[None]:
    """Let a model be asked for so many seconds, beginning now.

    Every forward pass looks at the clock before it starts: that is between any two tokens of an
    answer, and between any two batches of log-likelihoods. What is finished by then is kept.

    Args:
        model: Gets a hook meanwhile.
        limit_s: Seconds; None is no limit, and then the model is left alone.
        clock: Tells the time.
        where: What is being evaluated, for the message.

    Raises:
        EvaluationError: A forward pass would have started after the limit.
    """
    if limit_s is None:
        yield
        return
    started = clock()

    def check(module: torch.nn.Module, args: Any) -> None:
        elapsed = clock() - started
        if elapsed > limit_s:
            raise EvaluationError(
                f"{where}: not done after {elapsed:.1f} s, suite.time_limit allows {limit_s:g} s. "
                "Raise it if candidates as slow as this one are wanted."
            )

    hook = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
