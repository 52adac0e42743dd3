"""nevergrad's optimisers as proposers: CMA set up for noisy, quantised scores, and others by name.

What differs from nevergrad's defaults, and why:

* `CMA` and `DiagonalCMA` are CMA-ES (Hansen 2016, https://arxiv.org/abs/1604.00772), full or with a
  diagonal covariance. nevergrad's `CMA` chooses among several algorithms by budget and dimension.
* They search an unbounded space that is mirrored into [0, 1]. Between bounds, nevergrad would
  multiply the step by 0.3 or 0.15.
* They never start anew. pycma's stopping rules fire on equal scores, and nevergrad then begins
  again at the start point without a word: 420 times in 500 generations with accuracies in steps of
  1/20. A floor and a ceiling of the step take the place of those rules.
* They never drop a generation (`CmaProposer._sample_anew`).
* nevergrad is told neither budget nor number of workers: it would choose other populations or
  algorithms by them, and a study may be continued with more of either.
"""

import inspect
import re
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import JsonValue
from typing_extensions import override

from evomerge.config.proposer import ProposerConfig
from evomerge.errors import ConfigError
from evomerge.propose.proposer import AbstractProposer, Vector
from evomerge.registry import did_you_mean

with warnings.catch_warnings():
    # cma warns at import that it cannot plot; nevergrad would import it in mid-search
    warnings.filterwarnings("ignore", message="Could not import matplotlib")
    import cma  # noqa: F401

Maker = Callable[[ng.p.Parameter], Optimizer]
"""Makes an optimiser over a parametrisation."""

CMA = {"CMA": False, "DiagonalCMA": True}
"""Our own two by name, and whether the covariance is kept diagonal."""

TESTED = (
    "OnePlusOne",
    "DiscreteLenglerOnePlusOne",
    "DE",
    "TwoPointsDE",
    "LhsDE",
    "PSO",
    "TBPSA",
    "EDA",
    "RandomSearch",
    "ScrHaltonSearch",
)
"""Optimisers of nevergrad whose replay is tested. Any other has to pass `self_check`."""

SMALLEST_STEP = 1e-6
"""Share of a knob's range below which steps lead to the same recipe."""

LARGEST_STEP = 0.5
"""Share of a knob's range above which mirrored samples are as good as uniform."""

_INOPTS = {
    # never stop
    "tolfun": 0,
    "tolfunhist": 0,
    "tolflatfitness": 10**9,
    "tolx": 0,
    "tolstagnation": 10**9,
    "tolxstagnation": False,
    "tolfacupx": 1e300,
    "tolupsigma": 1e300,
    "tolconditioncov": 0,
    "maxiter": 10**9,
    # at nevergrad's -9, pycma obeys a file cma_signals.in in the working folder
    "verbose": -10,
    # below a population of 6, pycma would add mirrored samples and look for those numbers among the
    # told ones; nevergrad's change of scale alters their last bits
    "CMA_mirrors": 0,
}

_REFUSED = (
    (
        r"^NGOpt|^NGO$|MetaModel",
        "fails with numpy 2.4 and later once it has learned enough, hours into a search",
    ),
    (r"^DS9$", "hangs when it is asked for several candidates at once"),
)


class NevergradProposer(AbstractProposer):
    """An optimiser of nevergrad over the unit cube."""

    def __init__(self, config: ProposerConfig, start: Vector, step: Vector, seed: int) -> None:
        super().__init__(size=len(start), generation=config.population)
        self._spec = {
            "name": config.name,
            "population": config.population,
            "options": config.options,
            "start": start.tolist(),
            "step": step.tolist(),
            "seed": seed,
        }
        self._candidates: dict[int, ng.p.Parameter] = {}
        random = np.random.RandomState(seed % 2**32)
        self._optimizer = self._make(config, start, step, random)

    @override
    def spec(self) -> dict[str, Any]:
        return self._spec

    def _make(
        self, config: ProposerConfig, start: Vector, step: Vector, random: np.random.RandomState
    ) -> Optimizer:
        return _maker(config.name, config.options)(_cube(start, step, random))

    @override
    def _ask(self, ask_id: int) -> Vector:
        self._candidates[ask_id] = self._optimizer.ask()
        return self._to_units(self._candidates[ask_id].value)

    @override
    def _tell(self, ask_id: int, loss: float) -> None:
        self._optimizer.tell(self._candidates.pop(ask_id), loss)

    def _to_units(self, numbers: Vector) -> Vector:
        return np.array(numbers, dtype=np.float64)


class CmaProposer(NevergradProposer):
    """CMA-ES that never starts anew, over an unbounded space mirrored into the unit cube."""

    @override
    def mean(self) -> Vector | None:
        return self._to_units(self._start + self._step * self._strategy.mean)

    @override
    def _make(
        self, config: ProposerConfig, start: Vector, step: Vector, random: np.random.RandomState
    ) -> Optimizer:
        # in one dimension nevergrad wants another package: there, a second one means nothing
        idle = 1 if self.size == 1 else 0
        self._start = np.pad(start, (0, idle), constant_values=0.5)
        self._step = np.pad(step, (0, idle), mode="edge")
        limits = {"minstd": SMALLEST_STEP / self._step, "maxstd": LARGEST_STEP / self._step}
        maker = ng.optimizers.ParametrizedCMA(
            popsize=config.population,
            diagonal=CMA[config.name],
            elitist=_elitist(config),
            inopts={**_INOPTS, **limits},
        )
        space = ng.p.Array(init=self._start).set_mutation(sigma=self._step)
        space.random_state = random
        optimizer = maker(space)
        self._strategy = optimizer.es
        return optimizer

    @override
    def _tell(self, ask_id: int, loss: float) -> None:
        super()._tell(ask_id, loss)
        generations, rest = divmod(self.num_tells + 1, self.generation)
        assert self._optimizer.es is self._strategy, "CMA has started anew"
        assert self._strategy.countiter == generations, "CMA has dropped a generation"
        if rest == 0:
            self._sample_anew()

    def _sample_anew(self) -> None:
        """Replace nevergrad's samples in waiting by those of the generation that just began.

        Where more candidates are in flight than a generation has, nevergrad would first ask for its
        old samples; and pycma refuses two generations of tells without new samples in between,
        an error that nevergrad swallows together with the generation: a third of all tells, at
        worst, with 16 in flight. It has no public name for its queue.
        """
        self._optimizer._to_be_asked.clear()
        self._optimizer._to_be_asked.extend(self._strategy.ask())

    @override
    def _to_units(self, numbers: Vector) -> Vector:
        return mirror(np.asarray(numbers, dtype=np.float64)[: self.size])


def make_nevergrad(
    config: ProposerConfig, start: Vector, step: Vector, seed: int
) -> NevergradProposer:
    """Make a proposer by the name of its optimiser.

    Args:
        config: Name, population and options.
        start: Where the search begins, in [0, 1] per knob.
        step: Standard deviation of the first steps, as a share of each knob's range.
        seed: Seed of the optimiser's own random stream.

    Raises:
        ConfigError: There is no such optimiser or option, or it cannot be relied on here.
    """
    kind = CmaProposer if config.name in CMA else NevergradProposer
    return kind(config, start, step, seed)


def mirror(numbers: Vector) -> Vector:
    """Return numbers folded into [0, 1] as between mirrors: 1.2 becomes 0.8, -0.1 becomes 0.1."""
    folded = np.mod(numbers, 2.0)
    return np.minimum(folded, 2.0 - folded)


def self_check(maker: Maker) -> str | None:
    """Return why an optimiser cannot be relied on, or None; asks it for 64 candidates, twice."""
    try:
        first, second = _asks_on_a_sphere(maker), _asks_on_a_sphere(maker)
    except Exception as error:  # whatever one of 500 foreign optimisers raises is the answer
        reason = " ".join(str(error).split())[:120]
        return f"fails within 64 asks without a known budget ({type(error).__name__}: {reason})"
    if not np.array_equal(first, second):
        return "asks for other candidates when it is replayed from the same seed"
    return None if 0.0 <= first.min() <= first.max() <= 1.0 else "leaves the bounds"


def _asks_on_a_sphere(maker: Maker) -> Vector:
    # in four dimensions the metamodels begin to learn within the 64 asks
    random = np.random.RandomState(1)
    optimizer = maker(_cube(np.full(4, 0.4), np.full(4, 0.1), random))
    asked = []
    for _ in range(8):
        candidates = [optimizer.ask() for _ in range(8)]
        for candidate in candidates:
            asked.append(np.array(candidate.value))
            optimizer.tell(candidate, float(np.sum((candidate.value - 0.3) ** 2)))
    return np.array(asked)


def _cube(start: Vector, step: Vector, random: np.random.RandomState) -> ng.p.Array:
    # bounds set after the start value, so that what samples the whole range samples it evenly
    cube = ng.p.Array(init=start).set_mutation(sigma=step).set_bounds(0.0, 1.0)
    cube.random_state = random
    return cube


def _maker(name: str, options: dict[str, JsonValue]) -> Maker:
    registry = ng.optimizers.registry
    if name not in registry:
        near = get_close_matches(name, registry, n=1)
        hint = did_you_mean(name, near or [*CMA, *TESTED])
        raise ConfigError(f"proposer.name: nevergrad has no optimiser {name!r}.{hint}")
    maker: Maker = registry[name]
    reason = _known_reason(name, maker)
    if reason is None and options:
        maker = _with_options(name, maker, options)
    if reason is None and (options or name not in TESTED):
        reason = self_check(maker)
    if reason is not None:
        tested = ", ".join([*CMA, *TESTED])
        raise ConfigError(f"proposer.name: {name} {reason}. These are tested: {tested}.")
    return maker


def _known_reason(name: str, maker: Any) -> str | None:
    for pattern, reason in _REFUSED:
        if re.search(pattern, name):
            return reason
    if isinstance(maker, ng.optimizers.ParametrizedCMA):
        return "starts anew without a word when scores are equal; take CMA or DiagonalCMA"
    if maker.recast or maker.no_parallelization:
        return "has to be told of each candidate before it is asked for the next"
    return None


def _with_options(name: str, maker: Any, options: dict[str, JsonValue]) -> Maker:
    """Return the optimiser with other options of its family, under nevergrad's names."""
    if not isinstance(maker, ConfiguredOptimizer):
        raise ConfigError(f"proposer.options: {name} has no options. Remove them.")
    family = type(maker)
    known = list(inspect.signature(family).parameters)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ConfigError(f"proposer.options.{option}: is not an option of {name}.{hint}")
    try:
        changed: Maker = family(**{**maker.config(), **options})
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConfigError(f"proposer.options: {name} refuses them ({reason}).") from None
    return changed


def _elitist(config: ProposerConfig) -> bool:
    """Return the only option of CMA: whether the best candidate so far always stays a parent."""
    for option in config.options:
        if option != "elitist":
            hint = did_you_mean(option, ["elitist"])
            raise ConfigError(
                f"proposer.options.{option}: is not an option of {config.name}.{hint}"
            )
    elitist = config.options.get("elitist", False)
    if not isinstance(elitist, bool):
        raise ConfigError(f"proposer.options.elitist: came {elitist!r}, true or false is needed.")
    return elitist
