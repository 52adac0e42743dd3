"""Worker: holds the sources and one live model; merges a recipe into it and scores it.

Plain Python, no Ray.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from evomerge.adapters.open import Model, open_model
from evomerge.checkpoints.sidecars import configs_of
from evomerge.checkpoints.vocabulary import load_tokenizer
from evomerge.config.recipe import Recipe
from evomerge.errors import EvoMergeError, MergeError
from evomerge.evaluate.evaluator import SuiteFacts
from evomerge.evaluate.harness import Harness
from evomerge.evaluate.tasks import load_tasks
from evomerge.evaluate.time_limit import Clock
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.bind import BoundMerge, ModelSet
from evomerge.merging.execute import Merger
from evomerge.merging.live import LiveMerge, LiveWeights
from evomerge.merging.vocabulary import Vocabulary, align, fit_vocabulary
from evomerge.workers.job import Job, Outcome, WorkerSettings
from evomerge.workers.live_model import load_live_model, take_token_ids
from evomerge.workers.logs import about_trial, close_log, open_log
from evomerge.workers.placement import Placement

log = logging.getLogger(__name__)


class Worker:
    """Prepared once, then asked for one job after another.

    Sources are read by memory map. The live model is overwritten in place for each recipe; it has
    the config of the recipe's donor, as the exported folder has, and is loaded anew where that
    changes. A recipe that is live already is not merged again.

    Args:
        settings: What to prepare.
        name: How outcomes and logs call this worker.
        clock: Tells the time, for the suite's time limit.

    Raises:
        EvoMergeError: A model or task cannot be loaded.
    """

    def __init__(self, settings: WorkerSettings, name: str, clock: Clock = time.monotonic) -> None:
        self._log = open_log(settings.log_folder, f"worker-{name}") if settings.log_folder else None
        self.name, self._clock = name, clock
        torch.set_num_threads(settings.cpus)
        self._sources: Mapping[str, Model] = {str(ref): open_model(ref) for ref in settings.models}
        self._models = ModelSet(self._sources)
        # of a recipe's models with its vocabulary: what a row is filled with depends on both
        self._statistics: dict[str, StatisticsCache] = {}
        self._mergers: dict[tuple[str, ...], Merger] = {}
        self._settings, self._tasks = settings, load_tasks(settings.suite, settings.used)
        self._numbered = self._under_one_numbering()
        self._placement = Placement(settings, self._sources)
        self._configs = {model.folder: configs_of(model.folder) for model in self._sources.values()}
        self._make_ready(str(settings.models[0]), None)
        self._facts = self._harness.facts()
        # hash of the recipe in the live model, and what was written
        self._live: tuple[str, LiveMerge] | None = None
        log.info("worker %s is ready on %s", name, os.uname().nodename)

    def facts(self) -> SuiteFacts:
        """Return what identifies the prepared suite."""
        return self._facts

    def run(self, job: Job) -> Outcome:
        """Do one job; errors of the candidate come back in the outcome, never as an exception."""
        with about_trial(job.trial):
            started = time.perf_counter()
            try:
                live = self._materialise(job.recipe)
            except MergeError as error:
                return self._unsuccessful(job, "invalid", error)
            except Exception as error:
                return self._unsuccessful(job, "failed", error)
            merged = time.perf_counter()
            try:
                result = self._harness.score(self._model, job.chunk)
            except Exception as error:
                return self._unsuccessful(job, "failed", error)
            scored = time.perf_counter()
            log.info(
                "%s chunk %d: merged in %.3f s (%s), scored %d items in %.3f s",
                job.chunk.role,
                job.chunk.index,
                merged - started,
                ", ".join(live.kernels),
                job.chunk.num_items,
                scored - merged,
            )
            return Outcome(
                job,
                "done",
                self.name,
                result,
                live.digest,
                kernels=live.kernels,
                seconds_merge=merged - started,
                seconds_score=scored - merged,
            )

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            close_log(self._log)
            self._log = None

    def _materialise(self, recipe: Recipe) -> LiveMerge:
        if self._live is None or self._live[0] != recipe.hash:
            self._live = None  # a merge that stops half-way leaves weights of nobody
            bound = self._models.bind(recipe)
            donor = str(recipe.donor)
            if self._ready_for != self._configs_with(donor, bound.vocabulary.numbered_by):
                self._make_ready(donor, bound.vocabulary.numbered_by)
            fit_vocabulary(self._model, bound.vocabulary)
            written = self._weights.write(bound.plan, self._merger_of(bound))
            self._live = recipe.hash, written
        return self._live[1]

    def _merger_of(self, bound: BoundMerge) -> Merger:
        digest = bound.vocabulary.digest
        key = (digest, *bound.sources)
        if key not in self._mergers:
            statistics = self._statistics.setdefault(digest, StatisticsCache())
            sources = self._placement.sources(digest, bound.sources)
            self._mergers[key] = Merger(sources, statistics)
        return self._mergers[key]

    def _make_ready(self, donor: str, numbered_by: Path | None) -> None:
        """Load the live model with the config of a recipe's donor, and prepare the tasks for it.

        Models of one search may differ in what a weight does not show, such as a rotary base.
        """
        settings = self._settings
        dtype = getattr(torch, settings.out_dtype)
        attention = settings.suite.attn_implementation
        source = self._sources[donor]
        self._model = load_live_model(source.folder, dtype, attention, "cpu")
        fit_vocabulary(self._model, self._numbered)  # the harness checks its tokens against rows
        self._placement.take_in(self._model, source)
        self._weights = LiveWeights(self._model)
        if numbered_by is not None:
            take_token_ids(self._model, source.folder, numbered_by)
        tokenizer = load_tokenizer(self._numbered.tokenizer_folder)
        self._harness = Harness(self._tasks, settings.suite, self._model, tokenizer, self._clock)
        self._ready_for = self._configs_with(donor, numbered_by)

    def _configs_with(self, donor: str, numbered_by: Path | None) -> tuple[Any, ...]:
        folder = self._sources[donor].folder
        return self._configs[folder], numbered_by and self._configs[numbered_by]

    def _under_one_numbering(self) -> Vocabulary:
        """Return all models under the token numbers that every recipe has."""
        base, tokenizer = str(self._settings.models[0]), str(self._settings.tokenizer)
        folders = {name: model.folder for name, model in self._sources.items()}
        return align(None, tokenizer, None, folders, self._sources, base, base)

    def _unsuccessful(
        self, job: Job, kind: Literal["invalid", "failed"], error: Exception
    ) -> Outcome:
        ours = isinstance(error, EvoMergeError)
        log.warning("%s: %s", kind, one_line(error), exc_info=None if ours else error)
        return Outcome(job, kind, self.name, error=one_line(error))


def one_line(error: BaseException) -> str:
    """Return an error as one sentence: ours as it is, others with type and place of origin."""
    text = " ".join(str(error).split())
    if isinstance(error, EvoMergeError):
        return text
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}{place}: {text}"[:500]
