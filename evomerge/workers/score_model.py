"""Score a model from disk on a suite, exactly as a worker scores a candidate."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.locate import locate
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.config.models import ModelRef
from evomerge.config.suite import ItemRole, SuiteConfig
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluator import EvalResult, TaskMetric, join_results
from evomerge.evaluate.harness import Harness
from evomerge.evaluate.tasks import load_tasks
from evomerge.workers.live_model import load_live_model, load_tokenizer


@dataclass(frozen=True)
class ModelScores:
    """What a model scored.

    Attributes:
        metrics: Task name → metric key → metric, every metric the task reports.
        chosen: Task name → the metric that the suite names.
        items: Results per item.
        digest: Digest of the weights.
    """

    metrics: Mapping[str, Mapping[str, TaskMetric]]
    chosen: Mapping[str, TaskMetric]
    items: EvalResult
    digest: str


def score_model(
    model: ModelRef, suite: SuiteConfig, role: ItemRole, *, cpus: int = 1, device: str = "cpu"
) -> ModelScores:
    """Score a model in its stored dtype, with its own tokenizer.

    Args:
        model: Folder or hub id.
        suite: Tasks, metrics, items.
        role: Which items.
        cpus: CPU threads.
        device: `cpu` or `cuda`.

    Raises:
        EvoMergeError: The model or a task cannot be loaded, or the model gives NaN.
    """
    torch.set_num_threads(cpus)
    tasks = load_tasks(suite)
    chunks = tasks.chunks(role)
    if not chunks:
        raise ConfigError(
            f"suite.items.{role}: has no items. Give it a count above 0, or name another role."
        )
    folder = locate(model)
    checkpoint = open_checkpoint(folder, str(model))
    live = load_live_model(folder, checkpoint.main_dtype, suite.attn_implementation, device)
    harness = Harness(tasks, suite, live, load_tokenizer(folder))
    items = join_results([harness.score(live, chunk) for chunk in chunks])
    metrics = tasks.aggregate(items)
    chosen = {task.name: metrics[task.name][task.metric] for task in tasks.scored}
    return ModelScores(metrics, chosen, items, digest_of(checkpoint))
