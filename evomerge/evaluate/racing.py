"""Racing: which candidates are scored no further, and what the proposer is told of them.

Items come in fixed chunks. After each chunk a candidate is compared with the incumbent, the best
fully scored model when its generation began, on the items that both have seen. What is decided and
told follows from results per item alone: neither workers nor the order of arrival matter.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

from evomerge.config.search import RacingMode
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluator import EvalResult
from evomerge.evaluate.paired import Lead, Term, compare
from evomerge.evaluate.scores import ScoredTask

RISK: Mapping[RacingMode, float] = {"off": 0.0, "conservative": 0.05, "aggressive": 0.25}
"""Largest chance, over all looks together, that a candidate which is truly as good as the incumbent
is stopped; one that is better is stopped more rarely still."""


@dataclass(frozen=True)
class Race:
    """Candidates against one incumbent, which had been scored on all search items before.

    Attributes:
        mode: How readily candidates are stopped.
        num_chunks: Chunks of a full score.
        terms: The objective, linearised at the incumbent's metrics on search items: a candidate is
            then never taken for worse than it is. Without any, none is stopped.
        incumbent: Results per item, on all search items.
        score: The incumbent's objective there.
    """

    mode: RacingMode
    num_chunks: int
    terms: Sequence[Term]
    incumbent: EvalResult
    score: float

    def stops(self, seen: EvalResult) -> bool:
        """Return whether a candidate is scored no further.

        One-sided test of "as good as the incumbent" at each look, at the risk divided by the number
        of looks (Bonferroni), so that it holds however looks depend on each other. The last chunk
        is no look: nothing is left to save.

        Args:
            seen: The candidate's results on its first chunks, at least one.
        """
        if self.mode == "off" or not self.terms or self._share(seen) >= 1:
            return False
        return compare(self.terms, seen, self.incumbent).z <= self._limit

    def told(self, seen: EvalResult, first_chunks: Sequence[EvalResult]) -> float:
        """Return the objective to expect of a stopped candidate on all search items.

        Its lead counts for the items seen. For the others it counts as far as such leads have
        lasted: it is drawn towards the mean lead of the generation, by the share of its variance
        that is noise (Efron 1975, https://doi.org/10.2307/2285814, section 2). The lead alone would
        be too low by 1 to 3 points, since candidates are stopped where they happen to be unlucky.

        Args:
            seen: The candidate's results when it was stopped.
            first_chunks: Results of every candidate of its generation, itself among them, on the
                first chunk.
        """
        lead, share = compare(self.terms, seen, self.incumbent), self._share(seen)
        others = [compare(self.terms, first, self.incumbent) for first in first_chunks]
        return self.score + share * lead.value + (1 - share) * _lasting(lead, others)

    @cached_property
    def _limit(self) -> float:
        return NormalDist().inv_cdf(RISK[self.mode] / (self.num_chunks - 1))

    def _share(self, seen: EvalResult) -> float:
        every = sum(len(self.incumbent[term.task].ids) for term in self.terms)
        return sum(len(seen[t.task].ids) for t in self.terms if t.task in seen) / every


def check_racing(
    mode: RacingMode, num_chunks: int, tasks: Sequence[ScoredTask], means: Collection[str]
) -> None:
    """Refuse a race that could not be run.

    Args:
        mode: How readily candidates are stopped.
        num_chunks: Chunks of a full score.
        tasks: The tasks that count.
        means: Names of the tasks whose metric is the mean of its values per item.

    Raises:
        ConfigError: One line for each reason.
    """
    if mode == "off":
        return
    problems = [
        f"racing.mode: task {task.name!r} is scored by {task.metric}, which is no mean over items "
        "and known on all of them only. Turn racing off, give the task weight 0, or take a metric "
        "that is a mean."
        for task in tasks
        if task.name not in means
    ]
    if num_chunks < 2:
        problems.append(
            "racing.mode: the search items are 1 chunk, so nothing can be stopped in between. "
            "Raise suite.chunks, or turn racing off."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _lasting(lead: Lead, others: Sequence[Lead]) -> float:
    """Return the part of a lead that is expected of items not seen yet."""
    known = [other for other in others if other.variance < math.inf]
    if len(known) < 2 or lead.variance == math.inf:
        return lead.value
    mean = math.fsum(other.value for other in known) / len(known)
    noise = math.fsum(other.variance for other in known) / len(known)
    spread = math.fsum((other.value - mean) ** 2 for other in known) / (len(known) - 1)
    true_spread = max(spread - noise, 0.0)
    if true_spread == 0:
        return mean
    return mean + (lead.value - mean) * true_spread / (true_spread + lead.variance)
