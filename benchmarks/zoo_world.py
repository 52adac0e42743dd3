"""Is the zoo a fair little world? Base, parents, the best uniform merge and the winner, compared.

    python -m benchmarks.zoo_world

Needs a finished study of the config (default: configs/quickstart.yaml). The one weight of the
uniform task-arithmetic merge is chosen as a user would, on the search items; everything is compared
on the report items, which neither it nor the search has seen.
"""

import sys
from collections.abc import Iterable, Mapping

from evomerge.config.recipe import Recipe, Source
from evomerge.config.search import load_search
from evomerge.config.suite import ItemRole
from evomerge.evaluate.evaluator import TaskMetric, join_results
from evomerge.study.baselines import baseline_recipes
from evomerge.study.run import worker_settings
from evomerge.study.setup import Setup, prepare
from evomerge.study.view import StudyView
from evomerge.workers.job import Job
from evomerge.workers.worker import Worker

WEIGHTS = [round(0.05 * step, 2) for step in range(4, 21)]
"""Weights of the uniform merge that are tried: 0.2 to 1.0."""


def main() -> None:
    """Print the table, and what the world was asked to be."""
    path = sys.argv[1] if len(sys.argv) > 1 else "configs/quickstart.yaml"
    setup = prepare(load_search(path))
    worker = Worker(worker_settings(setup), "benchmark")
    winner = StudyView(setup.config).best
    sweep = {
        weight: mean(score(setup, worker, _uniform(setup, weight), "search")) for weight in WEIGHTS
    }
    best = max(sweep, key=lambda weight: sweep[weight])
    print("uniform task arithmetic on the search items")
    print("  ".join(f"{weight:g}: {mean:.3f}" for weight, mean in sweep.items()))
    recipes = {
        **baseline_recipes(setup),
        f"task arithmetic, all {best:g}": _uniform(setup, best),
        f"winner (trial {winner.number})": winner.recipe,
    }
    scores = {name: score(setup, worker, recipe, "report") for name, recipe in recipes.items()}
    _print(scores)


def _uniform(setup: Setup, weight: float) -> Recipe:
    models = setup.config.models
    sources = tuple(
        Source(model=ref, parameters={"weight": weight}) for ref in models.parents.values()
    )
    return Recipe(
        merge_method="task_arithmetic",
        base_model=models.base,
        models=sources,
        dtype="float32",
        out_dtype=setup.out_dtype,
    )


def score(setup: Setup, worker: Worker, recipe: Recipe, role: ItemRole) -> Mapping[str, TaskMetric]:
    """Return the chosen metric of each task on the items of a role."""
    outcomes = [worker.run(Job(0, recipe, chunk)) for chunk in setup.tasks.chunks(role)]
    failed = [outcome.error for outcome in outcomes if outcome.result is None]
    assert not failed, failed[0]
    return setup.metrics_of(join_results([o.result for o in outcomes if o.result is not None]))


def mean(metrics: Mapping[str, TaskMetric]) -> float:
    """Return the mean over the tasks."""
    return sum(metric.value for metric in metrics.values()) / len(metrics)


def _print(scores: Mapping[str, Mapping[str, TaskMetric]]) -> None:
    tasks: Iterable[str] = next(iter(scores.values()))
    width = max(map(len, scores))
    items = ", ".join(f"{m.num_items} {t}" for t, m in next(iter(scores.values())).items())
    print(f"\non the report items ({items})")
    print(f"{'':<{width}}  mean    " + "  ".join(tasks))
    for name, metrics in scores.items():
        cells = "  ".join(f"{metrics[task].value:>{len(task)}.4f}" for task in tasks)
        print(f"{name:<{width}}  {mean(metrics):.4f}  {cells}")


if __name__ == "__main__":
    main()
