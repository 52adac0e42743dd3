"""Placement: where a worker's sources and live model lie, as `merging/memory.py` chooses."""

import logging
from collections.abc import Mapping

import torch

from evomerge.checkpoints.arena import adopt, layout_for, load_arena
from evomerge.checkpoints.source import TensorSource
from evomerge.errors import ConfigError
from evomerge.merging.memory import gpu_memory, host_memory, memory_plan, needs_of
from evomerge.merging.places import live_views
from evomerge.workers.job import WorkerSettings

log = logging.getLogger(__name__)


class Placement:
    """Brings sources, and the live model, to where they are worked on; each source once.

    Args:
        settings: The worker's.
        models: Every model that a recipe may name, the base first.

    Raises:
        ConfigError: The models are too large for the worker's GPU.
    """

    def __init__(self, settings: WorkerSettings, models: Mapping[str, TensorSource]) -> None:
        self._device = settings.device
        self._loaded: dict[tuple[str, str], TensorSource] = {}
        self.choice: str = settings.sources
        self._pinned = settings.device != "cpu"
        if self.choice == "auto":
            dtype = getattr(torch, settings.out_dtype)
            needs = needs_of(models, next(iter(models)), dtype, settings.method)
            gpu = gpu_memory() if settings.gpus else None
            plan = memory_plan(needs, settings.count, settings.gpus, host_memory(), gpu)
            if plan.choice == "too large" and settings.gpus:
                raise ConfigError(f"workers: {plan.why}.")
            self.choice, self._pinned = plan.choice, plan.pinned
            log.info("sources %s: %s", plan.choice, plan.why)

    def sources(self, digest: str, sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """Return sources where they are worked on.

        Args:
            digest: Of the vocabulary that they are brought to.
            sources: The models by name.
        """
        return {name: self._placed((digest, name), source) for name, source in sources.items()}

    def _placed(self, key: tuple[str, str], source: TensorSource) -> TensorSource:
        if key not in self._loaded:
            if self.choice == "resident":
                source = load_arena(source, layout_for(source, self._device))
            elif self.choice == "streamed" and self._pinned:
                source = load_arena(source, layout_for(source, "cpu"), pinned=True)
            self._loaded[key] = source
        return self._loaded[key]

    def take_in(self, model: torch.nn.Module, source: TensorSource) -> None:
        """Bring a live model to the worker's device, into an arena laid out as the sources' are.

        Args:
            model: On the CPU. Views that were taken of it are not of it any more.
            source: The model that it was loaded from.
        """
        if self.choice == "resident":
            adopt(model, live_views(model, source.names()), self._device)
        model.to(self._device)
