"""Verdict: is the chosen merge better than the best parent? One paired test on unused items.

A search ends in three steps, each on items that no earlier step has seen. Search items rank the
candidates; on confirm items `choose` takes one merge and one parent; on report items `judge` tests
that one pair, once. Everything here is a pure function of results per item.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

from evomerge.errors import EvaluationError
from evomerge.evaluate.evaluator import EvalResult
from evomerge.evaluate.paired import Term, compare

SIZE = 0.025
"""Chance that the verdict calls a merge better that is not: one-sided."""

POWER = 0.8
"""Chance with which the smallest detectable gain is found."""

VOID_SIZE = 0.05
"""Chance that a verdict is voided though nothing differs, over all kinds of flags together. A guard
errs on the side of doubt."""

MISSING = "without a value"

_NORMAL = NormalDist()
_Z_SIZE = _NORMAL.inv_cdf(1 - SIZE)
_Z_POWER = _NORMAL.inv_cdf(POWER)

Outcome = Literal["better", "no_evidence", "void"]


@dataclass(frozen=True)
class Contender:
    """A model with its score on confirm items.

    Attributes:
        name: As the verdict calls it: `trial 41`, `uniform`, `parent math`.
        score: The objective on confirm items.
        is_merge: False for parents and the base.
    """

    name: str
    score: float
    is_merge: bool


def choose(contenders: Sequence[Contender]) -> tuple[Contender, Contender]:
    """Return the best merge and the best parent by their scores on confirm items.

    Of equals the earlier, so list what is simpler first. The pair is tested on report items, never
    on these: of 200 merges exactly as good as the parent, the one chosen among the best five and
    the proposer's mean on 400 items and tested on the very same items was "better" in 10.7 % of
    2,000 searches instead of 2.5 % (`python -m benchmarks.truth`).

    Args:
        contenders: At least one merge and one parent.
    """
    merges = [contender for contender in contenders if contender.is_merge]
    parents = [contender for contender in contenders if not contender.is_merge]
    return max(merges, key=_score), max(parents, key=_score)


@dataclass(frozen=True)
class Rate:
    """How often something that is no answer befell each model on the same items.

    Attributes:
        flag: What: `truncated`, `empty`, `extraction failed`.
        winner: Items of the winner.
        parent: Items of the parent.
        num_items: All items.
        p_value: Two-sided chance of such a difference if there were none.
        differs: Whether it voids the verdict.
    """

    flag: str
    winner: int
    parent: int
    num_items: int
    p_value: float
    differs: bool


def compare_rates(
    flags: Mapping[str, tuple[Sequence[bool], Sequence[bool]]],
) -> tuple[Rate, ...]:
    """Compare how often answers of winner and parent were cut off, empty or unreadable.

    The exact paired test of two proportions (McNemar 1947) on each flag, at `VOID_SIZE` divided by
    the number of flags.

    Args:
        flags: For each flag the winner's items and the parent's, in the same order.
    """
    rates = []
    for flag, (winner, parent) in flags.items():
        pairs = list(zip(winner, parent, strict=True))
        more = sum(bool(w) and not p for w, p in pairs)
        less = sum(bool(p) and not w for w, p in pairs)
        p_value = _sign_test(more, less)
        differs = p_value <= VOID_SIZE / len(flags)
        rates.append(Rate(flag, sum(winner), sum(parent), len(pairs), p_value, differs))
    return tuple(rates)


@dataclass(frozen=True)
class Side:
    """One of the two models of a verdict.

    Attributes:
        name: As the verdict calls it.
        search: The objective on search items.
        report: The objective on report items.
        items: Results per item on report items.
        flags: For each flag its report items, in an order that both sides share.
    """

    name: str
    search: float
    report: float
    items: EvalResult
    flags: Mapping[str, Sequence[bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What one paired test on unused items says of a winner. Scores are as the objective's.

    Attributes:
        winner: The merge that was tested.
        parent: What it was tested against.
        effect: Its lead in the terms that were tested.
        low: Lower end of the two-sided 95 % interval; above 0 exactly where the test rejects.
        high: Upper end.
        p_value: One-sided chance of such a lead if there were none.
        detectable: Lead that would be found with 80 % power, as many items differing.
        num_items: Report items that both have a value on.
        num_differing: Those in which the two differ.
        winner_search: The winner's objective on search items.
        winner_report: The same on report items.
        parent_search: The parent's objective on search items.
        parent_report: The same on report items.
        rates: What might void the verdict.
    """

    winner: str
    parent: str
    effect: float
    low: float
    high: float
    p_value: float
    detectable: float
    num_items: int
    num_differing: int
    winner_search: float
    winner_report: float
    parent_search: float
    parent_report: float
    rates: tuple[Rate, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """`better`, `no_evidence`, or `void` where a rate differs."""
        if any(rate.differs for rate in self.rates):
            return "void"
        return "better" if self.low > 0 else "no_evidence"

    @property
    def optimism(self) -> float:
        """Search score minus report score of the winner: what selection promised too much."""
        return self.winner_search - self.winner_report

    @property
    def parent_optimism(self) -> float:
        """The same of the parent: report items may be harder or easier than search items."""
        return self.parent_search - self.parent_report

    @property
    def sentence(self) -> str:
        """The verdict in plain words; a point is a hundredth of the objective."""
        interval = f"95 % interval {_points(self.low)} to {_points(self.high)}"
        gap = f"difference {_points(self.effect)} points, {interval}, {self.num_items} items"
        if self.outcome == "void":
            reasons = "; ".join(_difference(self, rate) for rate in self.rates if rate.differs)
            return (
                f"no verdict on {self.winner}: {reasons}. The {gap} may come from that: "
                "mend it and confirm on fresh items"
            )
        if self.outcome == "better":
            return (
                f"{self.winner} is better than {self.parent} by {_points(self.effect)} points "
                f"({interval}, {self.num_items} items)"
            )
        return (
            f"no evidence that any merge is better than {self.parent}: {gap}; a true gain of "
            f"{_points(self.detectable)} points would have been found four times in five"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data; floats survive a round trip exactly."""
        return {**asdict(self), "rates": [asdict(rate) for rate in self.rates]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Verdict":
        """Make the verdict from `to_json`'s data."""
        rates = tuple(Rate(**rate) for rate in data["rates"])
        return replace(cls(**{**data, "rates": ()}), rates=rates)


def judge(terms: Sequence[Term], winner: Side, parent: Side) -> Verdict:
    """Test the winner against the best parent, once, on report items never used before.

    Args:
        terms: The objective, linearised at the winner's metrics on confirm items.
        winner: The merge chosen on confirm items.
        parent: The parent chosen there, on the same report items.

    Raises:
        EvaluationError: There are too few report items with a value, a metric has no number per
            item, or no term is given.
    """
    if not terms:
        raise EvaluationError(
            f"objective.kind: the geometric mean of {winner.name} is 0, which no single item "
            "moves, so nothing can be tested. Use weighted_mean, or another metric."
        )
    _check_same_items(terms, winner, parent)
    lead = compare(terms, winner.items, parent.items)
    if math.isinf(lead.variance) or lead.effective_items <= _Z_SIZE**2:
        raise EvaluationError(
            f"suite.items.report: {lead.num_items} report items have a value for both "
            f"{winner.name} and {parent.name}, too few of some task for a test. Give each task "
            "more report items."
        )
    margin = lead.margin(_Z_SIZE)
    lost = {MISSING: (_missing(terms, winner.items), _missing(terms, parent.items))}
    flags = {flag: (winner.flags[flag], parent.flags[flag]) for flag in winner.flags}
    return Verdict(
        winner=winner.name,
        parent=parent.name,
        effect=lead.value,
        low=lead.value - margin,
        high=lead.value + margin,
        p_value=_NORMAL.cdf(-lead.z),
        detectable=(_Z_SIZE + _Z_POWER) * lead.stderr,
        num_items=lead.num_items,
        num_differing=lead.num_differing,
        winner_search=winner.search,
        winner_report=winner.report,
        parent_search=parent.search,
        parent_report=parent.report,
        rates=compare_rates({**flags, **lost}),
    )


def _check_same_items(terms: Sequence[Term], winner: Side, parent: Side) -> None:
    for term in terms:
        ours, theirs = winner.items[term.task].ids, parent.items[term.task].ids
        assert ours == theirs, f"task {term.task!r}: winner and parent have other report items"
    assert winner.flags.keys() == parent.flags.keys(), "both sides have the same flags"


def _missing(terms: Sequence[Term], items: EvalResult) -> list[bool]:
    return [value is None for term in terms for value in items[term.task].values[term.metric]]


def _score(contender: Contender) -> float:
    return contender.score


def _sign_test(more: int, less: int) -> float:
    """Return the two-sided chance that a fair coin splits so unevenly."""
    tosses = more + less
    tail = sum(math.comb(tosses, k) for k in range(max(more, less), tosses + 1))
    return min(1.0, 2 * tail / 2**tosses)


def _points(score: float) -> str:
    return f"{round(100 * score, 1) + 0.0:.1f}"  # no "-0.0"


def _difference(verdict: Verdict, rate: Rate) -> str:
    shares = (100 * count / rate.num_items for count in (rate.winner, rate.parent))
    ours, theirs = (f"{share:.1f} %" for share in shares)
    return f"{ours} of its answers are {rate.flag}, {theirs} of those of {verdict.parent}"
