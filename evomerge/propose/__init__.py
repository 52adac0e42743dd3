"""Floor 3: proposers, which ask for candidates and are told how good they were.

`proposer.py` has the protocol and `replay`; `nevergrad.py` has CMA and nevergrad's other
optimisers. A proposer is a function of its specification and of the log of asks and tells: a study
is continued by replaying its log, and nothing is pickled. Losses are minimised here; whoever tells
flips the sign.

To add a proposer: a file with a subclass of `AbstractProposer`, and a case in `make_proposer`. Add
its name to those that `tests/contracts/proposer.py` is run over: bounds, tells in any order, the
same asks in another process, replay from a cut in mid-generation. A library that is slow to import
is imported by that file alone.
"""

import numpy as np

from evomerge.config.proposer import ProposerConfig
from evomerge.propose.proposer import AbstractProposer
from evomerge.space.space import Space


def make_proposer(config: ProposerConfig, space: Space, seed: int) -> AbstractProposer:
    """Make a fresh proposer for a space.

    Args:
        config: The `proposer:` section.
        space: Gives the start values and first steps.
        seed: Seed of the proposer's own random stream.

    Raises:
        ConfigError: There is no such proposer or option, or it cannot be relied on here.
    """
    from evomerge.propose.nevergrad import make_nevergrad  # takes seconds to import

    start = np.array(space.initial, dtype=np.float64)
    step = np.array(space.steps(config.sigma), dtype=np.float64)
    return make_nevergrad(config, start, step, seed)
