"""A pool that scores by formula instead of by model, to inject faults and timing.

Everything else in the tests is real.
"""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from evomerge.config.layout import Layout
from evomerge.config.models import ModelRef
from evomerge.config.params import Param
from evomerge.config.search import make_search
from evomerge.config.strict import parse_yaml
from evomerge.evaluate.evaluator import Chunk, SuiteFacts, TaskItems, TaskMetric
from evomerge.evaluate.scores import ScoredTask, make_objective
from evomerge.space.decode import RecipeTemplate
from evomerge.space.space import build_space
from evomerge.study.driver import Driver, Surroundings
from evomerge.study.items import ItemStore
from evomerge.study.run import confirmations_of
from evomerge.study.setup import Setup
from evomerge.study.storage import mend_journal, open_storage
from evomerge.workers.job import Outcome
from evomerge.workers.pool import AbstractPool

WEIGHT = Param(
    name="weight", meaning="weight", default=None, per_model=True, low=-2, high=2, search=(0.0, 1.0)
)
OPTIMUM = {"a": 0.7, "b": 0.2}
NUM_ITEMS = 40
FEW = ("uniform", "greedy_soup")
ALL = (*FEW, "lambda_sweep", "ties", "model_stock")

CONFIG = """
study: {{name: s, folder: {folder}, seed: 3, budget: {{evaluations: {evaluations}}}, baselines: {baselines}}}
models: {{base: /m/base, parents: {{a: /m/a, b: /m/b}}}}
merge: {{method: task_arithmetic}}
space: {{weight: {{search: [0.0, 1.0]}}}}
suite: {{tasks: [{{task: t, metric: acc}}]}}
proposer: {{name: CMA, population: 4, mode: {mode}}}
workers: {{pool: ray, count: {workers}}}
"""


@dataclass(frozen=True)
class FormulaTasks:
    """Stands for the loaded tasks: one of 40 items in four chunks, and ten items to confirm on.

    A confirmation's items begin at 1000 times its number, report's at 500 more.
    """

    report: int = 0
    turn: int = 1

    scored = (ScoredTask("t", "acc,none"),)
    means = ("t",)
    leakage = ()

    def chunks(self, role):
        size = {"search": NUM_ITEMS, "confirm": 10, "report": self.report}[role]
        first = {"search": 0, "confirm": 1000 * self.turn, "report": 1000 * self.turn + 500}[role]
        return tuple(
            Chunk(role, i, {"t": tuple(range(first + start, first + min(start + 10, size)))})
            for i, start in enumerate(range(0, size, 10))
        )

    def drawn(self, roles):
        chunks = [chunk for role in roles for chunk in self.chunks(role)]
        return {"t": {"test": [i for chunk in chunks for i in chunk.items["t"]]}}

    def with_numbers(self, result):
        return result

    def aggregate(self, result):
        values = result["t"].values["acc,none"]
        return {"t": {"acc,none": TaskMetric(sum(values) / len(values), 0.1, len(values))}}


def score_of(recipe, item):
    """A smooth landscape with its top at OPTIMUM; baselines lie on it too."""
    weights = {str(s.model)[-1]: s.parameters.get("weight", 0.3) for s in recipe.models}
    distance = sum((weights.get(name, 0.0) - best) ** 2 for name, best in OPTIMUM.items())
    return 1.0 - distance + 0.001 * (item % 7)


@dataclass
class FormulaPool(AbstractPool):
    """Workers that answer in random order; `fault(job)` may return an outcome's kind to inject.

    `jobs` counts what was scored; `crash_after` outcomes, the process "dies" (raises Killed).
    """

    num_workers: int = 2
    seed: int = 0
    fault: object = None
    crash_after: int | None = None
    jobs: list = field(default_factory=list)
    running: dict = field(default_factory=dict)

    def __post_init__(self):
        self.rng = random.Random(self.seed)

    def facts(self):
        return SuiteFacts("digest")

    def idle(self):
        return tuple(w for w in map(str, range(self.num_workers)) if w not in self.running)

    def submit(self, worker, job):
        assert worker not in self.running
        self.running[worker] = job

    def collect(self, timeout_s):
        if not self.running:
            return []
        if self.crash_after is not None and len(self.jobs) >= self.crash_after:
            raise Killed
        worker = self.rng.choice(sorted(self.running))
        job = self.running.pop(worker)
        self.jobs.append((job.trial, job.chunk.role, job.chunk.index))
        kind = self.fault(job) if self.fault else None
        if kind is not None:
            return [Outcome(job, kind, worker, error=f"injected {kind}")]
        ids = job.chunk.items["t"]
        scores = TaskItems(ids, {"acc,none": tuple(score_of(job.recipe, i) for i in ids)})
        return [Outcome(job, "done", worker, {"t": scores}, job.recipe.hash[:8], 0.01, 0.02)]

    def close(self):
        self.running = {}


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def make_setup(folder, evaluations=12, mode="sync", workers=2, changes="", baselines=FEW, report=0):
    """A search with formulas for models and tasks; config, space and proposer are real."""
    text = CONFIG.format(
        folder=folder,
        evaluations=evaluations,
        mode=mode,
        workers=workers,
        baselines=f"[{', '.join(baselines)}]",
    )
    data, _ = parse_yaml(text + changes)
    config = make_search(data)
    layout = Layout(2, (("embed", "model.embed_tokens.weight"),))
    names = ["model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w"]
    space = build_space(config.space, {}, (WEIGHT,), ["a", "b"], layout, names)
    template = RecipeTemplate(
        merge_method="task_arithmetic",
        base=ModelRef(path="/m/base"),
        parents=tuple(config.models.parents.items()),
        shared={},
        per_model={},
        out_dtype="float32",
        tokenizer_source="/m/base",
        mask_seed=0,
    )
    return Setup(
        config=config,
        folders={},
        fingerprints={"base": "0", "a": "1", "b": "2"},
        layout=layout,
        out_dtype="float32",
        num_bytes=0,
        space=space,
        template=template,
        tasks=FormulaTasks(report),
        objective=make_objective(config.objective, FormulaTasks.scored),
    )


def run(
    setup,
    pool,
    interrupted=lambda: False,
    clock=None,
    confirm=False,
    observe=lambda summary: None,
):
    """Run (or resume) the setup's study in this process; returns its ledger.

    Or confirm it, and return the confirmation.
    """
    mend_journal(setup.config.study.journal)
    storage = open_storage(setup.config.study, create=True)
    storage.set_attribute("spec", {})
    confirmed = confirmations_of(storage)
    setup = replace(setup, tasks=replace(setup.tasks, turn=len(confirmed) + 1))
    around = Surroundings(
        storage=storage,
        items=ItemStore(Path(setup.config.study.folder) / "items"),
        pool=pool,
        proposer=setup.proposer(),
        observe=observe,
        interrupted=interrupted,
        clock=clock or (lambda: 0.0),
        confirmed=confirmed,
    )
    driver = Driver(setup, around)
    return driver.confirm() if confirm else driver.run()


def log_of(ledger):
    """What a study must agree on whatever happened to it: all but timing, workers, attempts."""
    return [
        (
            r.number,
            r.state,
            r.baseline,
            r.recipe.hash,
            dict(r.values),
            r.ask,
            r.result
            and (r.result.fitness, r.result.tell_seq, r.result.told_loss, r.result.examples),
        )
        for r in ledger.records
    ]
