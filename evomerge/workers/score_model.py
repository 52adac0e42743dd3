"""Score a model or a recipe on a suite, exactly as a worker scores a candidate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.adapters.open import open_model
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.vocabulary import load_tokenizer
from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Source
from evomerge.config.suite import ItemRole, SuiteConfig
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluator import EvalResult, TaskMetric, join_results
from evomerge.evaluate.harness import Harness
from evomerge.evaluate.tasks import load_tasks
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.bind import ModelSet
from evomerge.merging.live import write_live
from evomerge.workers.live_model import load_live_model, take_token_ids


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
    model: ModelRef | Recipe,
    suite: SuiteConfig,
    role: ItemRole,
    *,
    cpus: int = 1,
    device: str = "cpu",
) -> ModelScores:
    """Score a model in its stored dtype with its own tokenizer, or what a recipe makes.

    A recipe, and a model with an adapter, is merged straight into a live model of the right depth
    and vocabulary; nothing is written.

    Args:
        model: Folder or hub id, with an adapter or without; or a recipe.
        suite: Tasks, metrics, items.
        role: Which items.
        cpus: CPU threads.
        device: `cpu` or `cuda`.

    Raises:
        EvoMergeError: The model or a task cannot be loaded, the recipe is no merge, or the model
            gives NaN.
    """
    torch.set_num_threads(cpus)
    tasks = load_tasks(suite)
    chunks = tasks.chunks(role)
    if not chunks:
        raise ConfigError(
            f"suite.items.{role}: has no items. Give it a count above 0, or name another role."
        )
    if isinstance(model, ModelRef) and model.adapter:
        model = Recipe(merge_method="passthrough", models=(Source(model=model),))
    attention = suite.attn_implementation
    live, digest, tokenizer = (
        _merged(model, attention, device)
        if isinstance(model, Recipe)
        else _stored(model, attention, device)
    )
    harness = Harness(tasks, suite, live, tokenizer)
    items = join_results([harness.score(live, chunk) for chunk in chunks])
    metrics = tasks.aggregate(items)
    chosen = {task.name: metrics[task.name][task.metric] for task in tasks.scored}
    return ModelScores(metrics, chosen, items, digest)


def _stored(
    model: ModelRef, attention: str | None, device: str
) -> tuple[torch.nn.Module, str, Any]:
    source = open_model(model)
    live = load_live_model(source.folder, source.main_dtype, attention, device)
    return live, digest_of(source), load_tokenizer(source.folder)


def _merged(recipe: Recipe, attention: str | None, device: str) -> tuple[torch.nn.Module, str, Any]:
    models = {str(reference): open_model(reference) for reference in recipe.references()}
    donor = models[str(recipe.donor)]
    wanted = recipe.out_dtype or recipe.dtype
    dtype = getattr(torch, wanted) if wanted else donor.main_dtype
    bound = ModelSet(models).bind(recipe)
    live = load_live_model(donor.folder, dtype, attention, device, bound.config)
    if bound.vocabulary.numbered_by is not None:
        take_token_ids(live, donor.folder, bound.vocabulary.numbered_by)
    digest = write_live(bound.plan, bound.sources, StatisticsCache(keep_ranks=False), live)
    return live, digest, load_tokenizer(bound.vocabulary.tokenizer_folder)
