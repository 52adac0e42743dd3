"""Sink: merged tensors into a live model. `folder.py` stores the same bits in files."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

import torch

from evomerge.checkpoints.source import TensorSource
from evomerge.checksums import Checksum, checksum_of, weights_digest
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.checks import stop_at
from evomerge.merging.execute import execute
from evomerge.merging.places import left_out, live_views
from evomerge.merging.plan import MergePlan
from evomerge.registry import did_you_mean


def write_live(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    model: torch.nn.Module,
) -> str:
    """Overwrite a resident model's parameters and buffers with the merge.

    The tensors stay where they are, so whatever shares them (tied weights, captured graphs) sees
    the merge. Non-persistent buffers are left alone. A tensor that the files hold and transformers
    leaves out on loading is merged for the digest, and written nowhere. What transformers keeps in
    float32 in a 16-bit model gets the rounded values, as it would from the files.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`.
        statistics: Facts about these models; see `execute`.
        model: A model that has a place for each of the plan's tensors (`places.live_views`), on
            any device.

    Returns:
        The weights' digest, by the names on disk, taken from the model's own memory.

    Raises:
        MergeError: The model's tensors are not the plan's, in name, shape or dtype (found before
            anything is written); or one tensor of the model has two names in the plan and is to
            hold two things.
        NonFiniteError: As `execute`; part of the model has been overwritten then.
    """
    views = live_views(model, [job.spec.name for job in plan.jobs])
    stop_at(_live_problems(plan, model, views))
    checksums: dict[str, Checksum] = {}
    written: set[int] = set()
    for name, merged in execute(plan, sources, statistics):
        if name in views:
            _write(name, merged, views[name], written)
        checksums[name] = checksum_of(views.get(name, merged).to(merged.dtype))
    return weights_digest(checksums)


def _write(name: str, merged: torch.Tensor, view: torch.Tensor, written: set[int]) -> None:
    if view.data_ptr() in written and not torch.equal(view, merged.to(view.device)):
        raise MergeError(
            f"{name}: the model ties it to another tensor, but the merge of the two differs. "
            "Give both the same parameters."
        )
    view.copy_(merged)
    written.add(view.data_ptr())


def _live_problems(
    plan: MergePlan, model: torch.nn.Module, views: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    state, model_dtype = model.state_dict(), getattr(model, "dtype", None)
    for spec in (job.spec for job in plan.jobs):
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
