"""Verdict: is the chosen merge better than the best parent? One paired test on unused items.

A search ends in three steps, each on items that no earlier step has seen. Search items rank the
candidates; on confirm items `choose` takes one merge and one parent; on report items `judge` tests
that one pair, once. Everything here is a pure function of results per item.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

from evomerge.errors import EvaluationError
from evomerge.evaluate.evaluator import EvalResult, TaskMetric, Value
from evomerge.evaluate.scores import Metrics, Objective, ScoredTask

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
class Term:
    """How much a task's metric moves the objective.

    Attributes:
        task: The task.
        metric: Key of its metric.
        coefficient: Change of the objective per change of the metric.
    """

    task: str
    metric: str
    coefficient: float


@dataclass(frozen=True)
class Lead:
    """By how much one model is ahead of another on the same items, and how surely.

    The error is taken as it would be if there were no difference, which adds the square of the
    difference to the variance: for one task of zeros and ones this is McNemar's test. Its size was
    enumerated for 100, 200, 440 and 500 items of which 1 to 40 % differ: 0.1 to 2.51 % at a nominal
    2.5 %, where the ordinary paired z reaches 2.7 %, and the exact test rejects in 0 to 2.1 %.

    Attributes:
        value: Difference of the objective; positive where the first model is ahead.
        variance: Of `value`, by the spread of the paired differences within each task; inf where a
            task has fewer than two pairs.
        effective_items: Number of items, less where a few of them carry the objective.
        num_items: Pairs of items.
        num_differing: Those in which the two models differ.
    """

    value: float
    variance: float
    effective_items: float
    num_items: int
    num_differing: int

    @property
    def stderr(self) -> float:
        """Standard error of `value` if there were no difference."""
        return math.sqrt(self.variance + self.value**2 / self.effective_items)

    @property
    def z(self) -> float:
        """Standard errors between `value` and 0; about normal where there is no difference."""
        return self.value / self.stderr if self.value else 0.0

    def margin(self, z: float) -> float:
        """Return half the width of the interval of all differences that are within z errors."""
        if self.effective_items <= z**2:
            return math.inf
        return z * math.sqrt(self.variance / (1 - z**2 / self.effective_items))


def linearise(objective: Objective, at: Metrics) -> tuple[Term, ...]:
    """Return the terms whose weighted sum moves as the objective does near some metrics.

    For a weighted mean they are the objective itself, wherever they are taken. The worst task and
    the geometric mean are concave. Taken at the first model of a comparison, a lead in the terms
    therefore implies a lead in the objective (verdict: at the winner, from confirm items); taken at
    the second, the terms are never below the true lead (racing: at the incumbent).

    Args:
        objective: What is optimised; a parent-relative one with its parents.
        at: Metrics of the model, from other items than those to be compared.

    Returns:
        The tasks that move the objective; none where a geometric mean is 0.

    Raises:
        EvaluationError: A metric is missing.
    """
    alone = {task.name: _alone(objective, task, _metric(at, task)) for task in objective.tasks}
    total = math.fsum(task.weight for task in objective.tasks)
    shares = {task.name: task.weight / total for task in objective.tasks}
    if objective.config.kind == "worst_task":
        worst = min(alone, key=alone.__getitem__)
        shares = {name: float(name == worst) for name in alone}
    elif objective.config.kind == "geometric_mean":
        mean = objective(at).value
        shares = {n: share * mean / alone[n] if mean else 0.0 for n, share in shares.items()}
    return tuple(
        Term(task.name, task.metric, shares[task.name] * _slope(objective, task))
        for task in objective.tasks
        if shares[task.name]
    )


def compare(terms: Sequence[Term], model: EvalResult, reference: EvalResult) -> Lead:
    """Return how far a model is ahead of another on the same items.

    Tasks are strata: their variances are their own, and tasks are independent of each other.

    Args:
        terms: The objective, by `linearise`.
        model: Results per item.
        reference: Those of the other model; it may have been scored on more items. Pairs in which
            either has no value are left out.

    Raises:
        EvaluationError: A metric has no number per item.
    """
    value, variance, squares, num_items, num_differing = 0.0, 0.0, 0.0, 0, 0
    smallest = math.inf
    for term in terms:
        gaps = list(_gaps(term, model, reference))
        size, c = len(gaps), term.coefficient
        if size < 2:
            variance = math.inf
            continue
        mean = math.fsum(gaps) / size
        own = c**2 * math.fsum((gap - mean) ** 2 for gap in gaps) / (size - 1) / size
        value, variance, squares = value + c * mean, variance + own, squares + own**2 / size
        num_items, num_differing = num_items + size, num_differing + sum(g != 0 for g in gaps)
        smallest = min(smallest, size)
    spread = squares > 0 and variance < math.inf
    effective = variance**2 / squares if spread else smallest
    return Lead(value, variance, effective, num_items, num_differing)


def pseudo_values(
    column: Sequence[Value], aggregate: Callable[[Sequence[Value]], float]
) -> tuple[float, ...]:
    """Return a number per item for a smooth metric that is no mean, such as F1 or corpus BLEU.

    What the metric loses when an item is left out, scaled so that for a mean it is the item's own
    value: jackknife pseudo-values (Tukey 1958; Efron 1982, https://doi.org/10.1137/1.9781611970319,
    section 1). They take the place of the column in `compare`. Costs one aggregation per item.

    Args:
        column: Values per item, at least two, None left out.
        aggregate: The metric of any of them.
    """
    size, whole = len(column), aggregate(column)
    return tuple(
        size * whole - (size - 1) * aggregate([*column[:i], *column[i + 1 :]]) for i in range(size)
    )


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


def _gaps(term: Term, model: EvalResult, reference: EvalResult) -> Iterator[float]:
    """Yield the differences of items that both have a value on."""
    theirs = reference[term.task]
    known = dict(zip(theirs.ids, theirs.values[term.metric], strict=True))
    items = model.get(term.task)
    if items is None:
        return
    for i, value in zip(items.ids, items.values[term.metric], strict=True):
        ours, other = _number(term, value), _number(term, known[i])
        if ours is not None and other is not None:
            yield ours - other


def _number(term: Term, value: Value) -> float | None:
    if value is None or isinstance(value, int | float):
        return value
    raise EvaluationError(
        f"task {term.task!r}: {term.metric} gives {type(value).__name__} per item, no number that "
        "could be compared. Use a metric that is a mean over items."
    )


def _missing(terms: Sequence[Term], items: EvalResult) -> list[bool]:
    return [value is None for term in terms for value in items[term.task].values[term.metric]]


def _metric(metrics: Metrics, task: ScoredTask) -> float:
    metric = metrics.get(task.name, {}).get(task.metric)
    if metric is None:
        raise EvaluationError(
            f"task {task.name!r}: no {task.metric} was measured. Score it on some items first."
        )
    return metric.value


def _alone(objective: Objective, task: ScoredTask, value: float) -> float:
    """Return the score of a task by itself, as it enters the mean."""
    mean = objective.config.model_copy(update={"kind": "weighted_mean"})
    alone = replace(objective, config=mean, tasks=(task,))
    return alone({task.name: {task.metric: TaskMetric(value, None, 0)}}).value


def _slope(objective: Objective, task: ScoredTask) -> float:
    return _alone(objective, task, 1.0) - _alone(objective, task, 0.0)


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
