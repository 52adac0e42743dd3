"""Sink: merged tensors into a live model. `folder.py` stores the same bits in files."""

import gc
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import TensorSource
from evomerge.checksums import Checksum, weights_digest
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.checks import stop_at
from evomerge.merging.execute import Merged, Merger, Output, Place
from evomerge.merging.places import left_out, live_views
from evomerge.merging.plan import MergePlan
from evomerge.registry import did_you_mean

LAUNCH_BYTES = 2**30
"""Memory for what cannot be merged where it lies: task vectors of adapters, tensors that the live
model holds in another form. What is in memory anyway, which is most, is merged in one launch."""


class LiveMerge(NamedTuple):
    """What was written into a live model.

    Attributes:
        digest: The weights' digest, by the names on disk.
        kernels: Which implementations of the kernels ran.
    """

    digest: str
    kernels: tuple[str, ...]


class LiveWeights:
    """The weights of a resident model, overwritten by one merge after another.

    The tensors stay where they are, so whatever shares them (tied weights, captured graphs) sees
    the merge. Non-persistent buffers are left alone. A tensor that the files hold and transformers
    leaves out on loading is merged for the digest, and written nowhere. What transformers keeps in
    float32 in a 16-bit model gets the rounded values, as it would from the files.

    Args:
        model: On any device. Where its tensors lie is looked up once, and again when one of them
            has moved.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._found: tuple[tuple[TensorSpec, ...], list[int], dict[str, torch.Tensor]] | None = None

    def write(
        self,
        plan: MergePlan,
        merger: Merger,
    ) -> LiveMerge:
        """Overwrite the model's parameters and buffers with a merge.

        Args:
            plan: The merge.
            merger: Has the plan's models.

        Raises:
            MergeError: The model's tensors are not the plan's, in name, shape or dtype (found
                before anything is written); or one tensor of the model has two names in the plan
                and is to hold two things.
            NonFiniteError: As `execute`; part of the model has been overwritten then.
        """
        (written,) = write_together([plan], merger, [self])
        return written

    def places(self, plan: MergePlan) -> "Places":
        """Return where the tensors of a merge go.

        Raises:
            MergeError: As `write`.
        """
        return Places(self._views(plan))

    def _views(self, plan: MergePlan) -> dict[str, torch.Tensor]:
        specs = tuple(job.spec for job in plan.jobs)
        lies_at = [tensor.data_ptr() for tensor in _tensors(self.model)]
        if self._found is None or self._found[:2] != (specs, lies_at):
            views = live_views(self.model, [spec.name for spec in specs])
            stop_at(_live_problems(specs, self.model, views))
            self._found = specs, lies_at, views
        return self._found[2]


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def write_live(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    model: torch.nn.Module,
) -> str:
    """Overwrite a resident model once, and return the digest; see `LiveWeights.write`."""
    return LiveWeights(model).write(plan, Merger(sources, statistics)).digest


def write_together(
    plans: Sequence[MergePlan], merger: Merger, weights: Sequence[LiveWeights]
) -> list[LiveMerge]:
    """Overwrite K resident models with K merges of the same models over one read of those.

    Args:
        plans: The merges.
        merger: Has their models.
        weights: Where each goes.

    Raises:
        MergeError, NonFiniteError: As `LiveWeights.write`; or the merges have other tensors.
    """
    places = [live.places(plan) for live, plan in zip(weights, plans, strict=True)]
    outputs = [Output(each.place, LAUNCH_BYTES) for each in places]
    checksums: list[dict[str, Checksum]] = [{} for _ in plans]
    kernels: set[str] = set()
    with _uncollected():
        for group in merger.execute_together(plans, None, outputs):
            for merged, place, found in zip(group, places, checksums, strict=True):
                place.fill(merged)
                found[merged.name] = merged.checksum
                kernels.update(merged.kernels)
    return [LiveMerge(weights_digest(found), tuple(sorted(kernels))) for found in checksums]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let Python's garbage collector wait.

    The many small objects of a launch set it off, and going through all modules takes 0.1 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Places:
    """Where the tensors of one merge go: into the live model's own memory wherever they can."""

    def __init__(self, views: Mapping[str, torch.Tensor]) -> None:
        self._views = views
        self._taken: set[int] = set()
        self._elsewhere: set[str] = set()

    def place(self, spec: TensorSpec) -> Place:
        """Give the memory that a tensor is merged into; see `execute.Output`."""
        view = self._views.get(spec.name)
        fits = view is not None and view.dtype == spec.dtype and view.is_contiguous()
        if view is not None and fits and view.data_ptr() not in self._taken:
            self._taken.add(view.data_ptr())
            return Place(view, is_new=False)
        self._elsewhere.add(spec.name)
        device = None if view is None else view.device
        return Place(torch.empty(spec.shape, dtype=spec.dtype, device=device), is_new=True)

    def fill(self, merged: Merged) -> None:
        """Bring a tensor that was merged elsewhere into the model."""
        view = self._views.get(merged.name)
        if view is None or merged.name not in self._elsewhere:
            return
        if view.data_ptr() in self._taken and not torch.equal(view, merged.tensor.to(view)):
            raise MergeError(
                f"{merged.name}: the model ties it to another tensor, but the merge of the two "
                "differs. Give both the same parameters."
            )
        view.copy_(merged.tensor)
        self._taken.add(view.data_ptr())


def _live_problems(
    specs: Iterable[TensorSpec], model: torch.nn.Module, views: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    state, model_dtype = model.state_dict(), getattr(model, "dtype", None)
    for spec in specs:
        view = views.get(spec.name)
        if view is None:
            if not left_out(model, spec.name):
                yield (
                    f"{spec.name}: the live model has no such tensor."
                    f"{did_you_mean(spec.name, state)}"
                )
            continue
        kept_wide = view.dtype is torch.float32 and spec.dtype == model_dtype
        if tuple(view.shape) != spec.shape or not (view.dtype == spec.dtype or kept_wide):
            yield (
                f"{spec.name}: the live model has {tuple(view.shape)} {view.dtype}, the merge "
                f"{spec.shape} {spec.dtype}. Load the base model in the recipe's out_dtype."
            )
    yield from _not_overwritten(state, views.values())


def _not_overwritten(
    state: Mapping[str, torch.Tensor], views: Iterable[torch.Tensor]
) -> Iterator[str]:
    elements = {view.data_ptr(): view.numel() for view in views}
    starts = sorted(elements)
    for name, tensor in state.items():
        first = bisect_left(starts, tensor.data_ptr())
        end = bisect_left(starts, tensor.data_ptr() + tensor.nbytes)
        if sum(elements[start] for start in starts[first:end]) < tensor.numel():
            yield f"{name}: the live model has it, and the models that are merged do not."
