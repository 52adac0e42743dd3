"""Is the search on the zoo better than random search? The quickstart over many seeds.

    python -m benchmarks.zoo_seeds --seeds 20 --out seeds.jsonl [--json]

Each seed is one whole quickstart, inline, with `random_search` among its baselines: as many random
candidates as the search has scored, on the same items. Compared on all report items, which chose
nothing:

* `search`: the candidate that is best on search items.
* `confirmed`: what confirmation chooses, random search left out.
* `random`: the random candidate that is best on search items.
* `parent`: the parent that confirmation chooses.

Every seed has the same models and items, so the spread is that of the search alone. A line of JSON
is appended for each seed that is done; seeds that stand in the file are not run again.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import commit, count, print_table
from benchmarks.zoo_world import mean, score
from evomerge.config.recipe import Recipe
from evomerge.config.search import load_search
from evomerge.evaluate.verdict import Contender, choose
from evomerge.study.baselines import RANDOM, RANDOM_STEP, main_baselines
from evomerge.study.confirmation import Confirmation, is_parent
from evomerge.study.run import run_search, worker_settings
from evomerge.study.setup import prepare
from evomerge.study.view import StudyView
from evomerge.workers.worker import Worker

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
BASELINES = ("uniform", "greedy_soup", "lambda_sweep", "ties", "model_stock", RANDOM)
NAMES = ("search", "confirmed", "random", "parent")
PAIRS = (("search", "random"), ("confirmed", "random"), ("confirmed", "parent"))
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}

Line = dict[str, float]
"""What is kept of a seed."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the seeds that are not in the file, and print what all of them came to."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--seeds", type=count, default=20, help="1 to this one, default 20")
    made.add_argument("--out", type=Path, required=True, help="file of JSON lines; may exist")
    made.add_argument("--config", type=Path, default=CONFIG, help="default: the quickstart")
    made.add_argument("--set", action="append", default=[], help="as of evomerge search")
    made.add_argument("--json", action="store_true", help="one JSON object")
    arguments = made.parse_args(words)
    wanted = range(1, arguments.seeds + 1)
    for seed in wanted:
        if seed not in read(arguments.out):
            line = run_seed(arguments.config, arguments.set, seed)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    known = read(arguments.out)
    found = summarise([known[seed] for seed in wanted])
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)


def read(path: Path) -> dict[int, Line]:
    """Return the seeds that stand in the file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["seed"]: line for line in map(json.loads, lines)}


def run_seed(path: Path, settings: Sequence[str], seed: int) -> Line:
    """Search with one seed, and score what was found on the report items."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            f"study.folder={folder}",
            f"study.seed={seed}",
            f"study.baselines=[{', '.join(BASELINES)}]",
            "suite.items.report.count=null",
            "workers={pool: inline, count: 1, cpus: 1}",
        ]
        config = load_search(path, [*changes, *settings])
        run_search(config)
        study = StudyView(config)
        luckiest = main_baselines(study.ledger.baselines)[RANDOM]
        winner, parent = choose_without_random(study.confirmations[-1])
        recipes = {
            "search": study.best.recipe,
            "confirmed": study.ledger[winner].recipe,
            "random": luckiest.recipe,
            "parent": study.ledger[parent].recipe,
        }
        setup = prepare(config)
        worker = Worker(worker_settings(setup), "report")

        def reported(recipe: Recipe) -> float:
            return round(mean(score(setup, worker, recipe, "report")), 6)

        assert study.best.result is not None, "what is best is scored"
        assert luckiest.result is not None, "likewise"
        return {
            "seed": seed,
            **{name: reported(recipe) for name, recipe in recipes.items()},
            "search_on_search": study.best.result.fitness,
            "random_on_search": luckiest.result.fitness,
            "num_candidates": study.ledger.num_evaluations,
            "num_random": sum(name.startswith(RANDOM_STEP) for name in study.ledger.baselines),
            "seconds": round(time.perf_counter() - started, 1),
            "commit": commit(),
        }


def choose_without_random(confirmed: Confirmation) -> tuple[int, int]:
    """Return the trials of the merge and the parent that are best on confirm items."""
    contenders = [
        Contender(name, found.objective, not is_parent(name))
        for name, found in confirmed.scores.items()
        if name != RANDOM
    ]
    winner, parent = choose(contenders)
    return confirmed.scores[winner.name].trial, confirmed.scores[parent.name].trial


def summarise(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Return the distribution of each score and of each paired difference over the seeds."""
    found = {name: distribution([line[name] for line in lines]) for name in NAMES}
    for one, other in PAIRS:
        differences = [line[one] - line[other] for line in lines]
        found[f"{one} - {other}"] = {
            **distribution(differences),
            "stderr": standard_error(differences),
            "ahead": sum(difference > 0 for difference in differences),
            "equal": sum(difference == 0 for difference in differences),
        }
    return found


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Return the number, the mean and some quantiles of values."""
    ordered = sorted(values)
    quantiles = {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    return {"num": len(values), "mean": statistics.fmean(values), **quantiles}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of them lies, between two of them if need be."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return statistics.stdev(values) / len(values) ** 0.5


def show(found: dict[str, dict[str, float]]) -> None:
    """Print a row for each score and each difference, in points."""
    counts = ("num", "ahead", "equal")
    print_table(
        [
            {
                "points": name,
                **{k: str(int(v)) if k in counts else f"{100 * v:.2f}" for k, v in row.items()},
            }
            for name, row in found.items()
        ]
    )


if __name__ == "__main__":
    main()
