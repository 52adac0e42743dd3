"""Does the verdict tell the truth, and does confirmation find what is truly best? Synthetic items.

    python -m benchmarks.truth [--seeds 2000] [--json]

No model runs: items have difficulties that all candidates share, an answer is right where ability
exceeds difficulty, and true scores are known in closed form. What decides is the package's own:
`evomerge.evaluate.verdict`, `evomerge.evaluate.racing`, and CMA-ES as searches use it.

* False claims: 200 merges exactly as good as the parent; the whole way from search to verdict.
* Power: a winner truly 6 points better, 20 % of 440 report items answered differently.
* True score: searches over 8 knobs, as many as a twentieth of the seeds. A merge's answers change
  with its knobs as smoothly as its ability does, so that a search can fit its items.
* Racing: the same searches with 800 items, whole and with half the items.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

from benchmarks import measure
from evomerge.config.proposer import ProposerConfig
from evomerge.config.search import RacingMode
from evomerge.evaluate.evaluator import EvalResult, TaskItems
from evomerge.evaluate.paired import Term, compare
from evomerge.evaluate.racing import RISK, Race
from evomerge.evaluate.verdict import Contender, Side, Verdict, choose, judge
from evomerge.propose.nevergrad import make_nevergrad
from evomerge.propose.proposer import AbstractProposer

TERMS = (Term("questions", "acc,none", 1.0),)
DIFFICULTY, TASTE = 1.0, 0.5
"""Spread of what items ask of everybody, and of what they ask of one model: with these, two models
of 50 % answer 20 % of the items differently."""

NUM_EQUAL, NUM_EQUAL_ITEMS = 200, 100
NUM_SEARCH, NUM_CONFIRM, NUM_REPORT, BEST = 200, 400, 440, 5
KNOBS, POPULATION, STEP = 8, 8, 0.1
BUDGET = 40_000
"""Items of a search, those of its confirmation included."""

FIXED = (50, 100, 200, 400, 800)
RACE_ITEMS, RACE_CHUNKS, RACE_CANDIDATES = 800, 8, 120
CHUNK = RACE_ITEMS // RACE_CHUNKS

Answers = NDArray[np.bool_]
Vectors = NDArray[np.float64]


def main() -> None:
    """Run all four parts and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=measure.count, default=2000, help="default 2000")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    found = run(arguments.seeds)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(name)
            for part, number in value.items():
                print(f"  {part}: {number:.4g}")
        else:
            print(f"{name}: {value:.4g}")


def run(seeds: int) -> dict[str, float | dict[str, float]]:
    """Return everything that is measured; scores, gains and errors in points."""
    searches = [search_all(seed) for seed in range(max(seeds // 20, 2))]
    runs = {name: [found[name] for found in searches] for name in searches[0]}
    return {
        **false_claims(seeds),
        "power": power(seeds),
        "stopped_though_equal": {mode: stopped_though_equal(mode, seeds) for mode in RISK},
        "true_score": {name: 100 * fmean(one.true for one in runs[name]) for name in runs},
        "stderr": {
            name: 100 * stdev(one.true for one in runs[name]) / math.sqrt(len(searches))
            for name in runs
        },
        "promised": {name: 100 * fmean(one.promised for one in runs[name]) for name in runs},
        "items": {name: fmean(one.items for one in runs[name]) for name in runs},
        "told_error": told_errors(runs, 0),
        "lead_error": told_errors(runs, 1),
        "num_seeds": seeds,
        "num_searches": len(searches),
    }


def false_claims(seeds: int) -> dict[str, float]:
    """Let 200 merges exactly as good as the parent go the whole way; the truth is "no better"."""
    claims, same_items, naive = 0, 0, []
    for seed in range(seeds):
        rng = np.random.default_rng([1, seed])
        search = answers_of_equals(rng, NUM_EQUAL + 1, NUM_EQUAL_ITEMS)
        scores = search.mean(axis=1)
        best = np.argsort(-scores[1:], kind="stable")[:BEST] + 1
        naive.append(100 * float(scores[best[0]] - scores[0]))
        # the parent, the best five, the proposer's mean
        confirm = answers_of_equals(rng, BEST + 2, NUM_CONFIRM)
        contenders = [Contender(str(i), float(a.mean()), i > 0) for i, a in enumerate(confirm)]
        chosen = int(choose(contenders)[0].name)
        same_items += verdict(confirm[chosen], confirm[0]).outcome == "better"
        winner, parent = answers_of_equals(rng, 2, NUM_REPORT)
        claims += verdict(winner, parent).outcome == "better"
    return {
        "false_claim_rate": claims / seeds,
        "same_items_claim_rate": same_items / seeds,
        "naive_optimism_points": fmean(naive),
    }


def power(seeds: int) -> float:
    """Return how often a winner that is truly 6 points better is called better."""
    found = 0
    for seed in range(seeds):
        kinds = np.random.default_rng([2, seed]).choice(4, NUM_REPORT, p=[0.13, 0.07, 0.4, 0.4])
        winner, parent = (kinds == 0) | (kinds == 2), (kinds == 1) | (kinds == 2)
        found += verdict(winner, parent).outcome == "better"
    return found / seeds


def stopped_though_equal(mode: RacingMode, seeds: int) -> float:
    """Return how often a candidate exactly as good as the incumbent is stopped at any look."""
    stopped = 0
    for seed in range(seeds):
        rng = np.random.default_rng([3, seed])
        incumbent, candidate = answers_of_equals(rng, 2, RACE_ITEMS)
        race = Race(mode, RACE_CHUNKS, TERMS, results(incumbent), float(incumbent.mean()))
        stopped += first_stop(race, candidate) < RACE_ITEMS
    return stopped / seeds


def told_errors(runs: "Mapping[str, Sequence[Found]]", column: int) -> dict[str, float]:
    """Return by how much stopped candidates were told too high, where any were stopped."""
    errors = {name: np.array([e for one in runs[name] for e in one.errors]) for name in runs}
    return {name: 100 * float(e[:, column].mean()) for name, e in errors.items() if len(e)}


def answers_of_equals(rng: np.random.Generator, num_models: int, num_items: int) -> Answers:
    """Return which items each model gets right, all being right on half of all items there are."""
    difficulty = rng.normal(0.0, DIFFICULTY, num_items)
    return rng.normal(0.0, TASTE, (num_models, num_items)) > difficulty


def results(answers: Answers) -> EvalResult:
    """Return answers as an evaluator would."""
    values = tuple(answers.tolist())
    return {"questions": TaskItems(tuple(range(len(values))), {"acc,none": values})}


def verdict(winner: Answers, parent: Answers) -> Verdict:
    """Return the verdict on some answers."""
    sides = (
        Side(name, 0.0, float(answers.mean()), results(answers))
        for name, answers in (("winner", winner), ("parent", parent))
    )
    return judge(TERMS, *sides)


def first_stop(race: Race, answers: Answers) -> int:
    """Return how many items a candidate is scored on."""
    for seen in range(CHUNK, RACE_ITEMS, CHUNK):
        if race.stops(results(answers[:seen])):
            return seen
    return len(answers)


class World:
    """Merges of 8 knobs, with one best point; a parent of 50 %; the best merge has 62 %."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([4, seed])
        self._best = self.rng.uniform(0.2, 0.8, KNOBS)
        # random waves: tastes are smooth in the knobs, and alike for merges within about 0.5
        self._waves = self.rng.normal(0.0, 2.0, (KNOBS, 96))
        self._phases = self.rng.uniform(0.0, 2 * np.pi, 96)

    def ability(self, vectors: Vectors) -> Vectors:
        """Return how able merges are; 0 is the parent."""
        return 0.34 - 1.5 * np.square(vectors - self._best).sum(axis=1)

    def true_score(self, vector: Vectors) -> float:
        """Return the share of all items there are that a merge gets right."""
        return NormalDist().cdf(
            float(self.ability(vector[None])[0]) / math.hypot(DIFFICULTY, TASTE)
        )

    def draw(self, num_items: int) -> "Items":
        """Return new items."""
        size = TASTE * math.sqrt(2 / len(self._phases))
        difficulty = self.rng.normal(0.0, DIFFICULTY, num_items)
        tastes = self.rng.normal(0.0, size, (len(self._phases), num_items))
        return Items(difficulty, tastes, self.rng.normal(0.0, TASTE, num_items) > difficulty)

    def answers(self, vectors: Vectors, items: "Items") -> Answers:
        """Return which items each merge gets right."""
        taste = np.cos(vectors @ self._waves + self._phases) @ items.tastes
        return self.ability(vectors)[:, None] + taste > items.difficulty


@dataclass(frozen=True)
class Items:
    """Items of one role: difficulties, what each wave adds, and the parent's answers."""

    difficulty: Vectors
    tastes: Vectors
    parent: Answers


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        true: True score of what it recommends.
        promised: Best score on search items.
        items: Items scored, confirmation included.
        errors: Of stopped candidates, how much too high they were told, and how much too high the
            incumbent's score plus their lead was.
    """

    true: float
    promised: float
    items: int
    errors: list[tuple[float, float]]


def search_all(seed: int) -> dict[str, Found]:
    """Search one world in all ways."""
    whole = RACE_ITEMS * (RACE_CANDIDATES + 1)
    found = {f"best of {n} items": search(World(seed), seed, n, BUDGET) for n in FIXED}
    found[f"{NUM_SEARCH} items, confirmed"] = search(World(seed), seed, NUM_SEARCH, BUDGET, BEST)
    extra = NUM_CONFIRM * (BEST + 2)
    for name, budget, mode in (
        ("all items", whole, "off"),
        ("half the items", whole // 2, "off"),
        ("half the items, conservative race", whole // 2, "conservative"),
        ("half the items, aggressive race", whole // 2, "aggressive"),
    ):
        found[name] = search(World(seed), seed, RACE_ITEMS, budget + extra, BEST, mode)
    return found


def search(
    world: World, seed: int, num_items: int, budget: int, best: int = 0, mode: RacingMode = "off"
) -> Found:
    """Search with CMA-ES until the items are spent.

    Args:
        world: Fresh.
        seed: Of the proposer.
        num_items: Search items, the same for every candidate.
        budget: Items that may be scored.
        best: Candidates that are confirmed beside the proposer's mean; 0 recommends the best on
            search items.
        mode: Racing.
    """
    items = world.draw(num_items)
    config = ProposerConfig(population=POPULATION)
    proposer = make_nevergrad(config, np.full(KNOBS, 0.5), np.full(KNOBS, STEP), seed)
    log = Log(items.parent, num_items)
    reserve = NUM_CONFIRM * (best + 2) if best else 0
    while log.spent + POPULATION * num_items + reserve <= budget:
        generation(world, proposer, items, log, mode)
    mean = proposer.mean()
    assert mean is not None, "CMA has a mean"
    log.done.sort(key=lambda one: -one[0])
    promised, chosen = log.done[0] if log.done else (float(log.incumbent.mean()), mean)
    if best:
        chosen = confirm(world, [*(vector for _, vector in log.done[:best]), mean])
    return Found(world.true_score(chosen), promised, log.spent + reserve, log.errors)


@dataclass
class Log:
    """What a search has seen: the incumbent's answers, items spent, full scores, errors told."""

    incumbent: Answers
    spent: int
    done: list[tuple[float, Vectors]] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)


def generation(
    world: World, proposer: AbstractProposer, items: Items, log: Log, mode: RacingMode
) -> None:
    """Ask for a generation, score it as far as the race goes, and tell."""
    first_ask = proposer.num_asks
    vectors = np.array([proposer.ask() for _ in range(POPULATION)])
    every = world.answers(vectors, items)
    # the incumbent is the one that stood when the generation began
    race = Race(mode, RACE_CHUNKS, TERMS, results(log.incumbent), float(log.incumbent.mean()))
    first_chunks = [results(answers[:CHUNK]) for answers in every]
    for i, answers in enumerate(every):
        told = full = float(answers.mean())
        num_seen = len(answers) if mode == "off" else first_stop(race, answers)
        if num_seen < len(answers):
            seen = results(answers[:num_seen])
            told = race.told(seen, first_chunks)
            lead = race.score + compare(TERMS, seen, race.incumbent).value
            log.errors.append((told - full, lead - full))
        else:
            log.done.append((full, vectors[i]))
            log.incumbent = max(log.incumbent, answers, key=np.mean)
        log.spent += num_seen
        proposer.tell(first_ask + i, -told)


def confirm(world: World, shortlist: Sequence[Vectors]) -> Vectors:
    """Return the one that is best on confirm items."""
    scores = world.answers(np.array(shortlist), world.draw(NUM_CONFIRM)).mean(axis=1)
    return shortlist[int(np.argmax(scores))]


if __name__ == "__main__":
    main()
