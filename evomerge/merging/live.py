"""Sink: merged tensors into a live model. `folder.py` stores the same bits in files."""

from collections.abc import Iterator, Mapping

import torch

from evomerge.checkpoints.fingerprint import Checksum, checksum_of, weights_digest
from evomerge.checkpoints.source import TensorSource
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.checks import stop_at
from evomerge.merging.execute import execute
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
    the merge. Non-persistent buffers are left alone.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`.
        statistics: Facts about these models; see `execute`.
        model: A model whose `state_dict` has the plan's tensors, on any device.

    Returns:
        The weights' digest, taken from the model's own memory.

    Raises:
        MergeError: The model's tensors are not the plan's, in name, shape or dtype (found before
            anything is written); or one tensor of the model has two names in the plan and is to
            hold two things.
        NonFiniteError: As `execute`; part of the model has been overwritten then.
    """
    targets = model.state_dict()
    stop_at(_live_problems(plan, targets))
    checksums: dict[str, Checksum] = {}
    written: set[int] = set()
    for name, merged in execute(plan, sources, statistics):
        target = targets[name]
        if target.data_ptr() in written and not torch.equal(target, merged.to(target.device)):
            raise MergeError(
                f"{name}: the model ties it to another tensor, but the merge of the two differs. "
                "Give both the same parameters."
            )
        target.copy_(merged)
        written.add(target.data_ptr())
        checksums[name] = checksum_of(target)
    return weights_digest(checksums)


def _live_problems(plan: MergePlan, targets: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for job in plan.jobs:
        spec = job.spec
        target = targets.get(spec.name)
        if target is None:
            yield (
                f"{spec.name}: the live model has no such tensor.{did_you_mean(spec.name, targets)}"
            )
        elif (tuple(target.shape), target.dtype) != (spec.shape, spec.dtype):
            yield (
                f"{spec.name}: the live model has {tuple(target.shape)} {target.dtype}, the merge "
                f"{spec.shape} {spec.dtype}. Load the base model in the recipe's out_dtype."
            )
    covered = {targets[job.spec.name].data_ptr() for job in plan.jobs if job.spec.name in targets}
    for name, target in targets.items():
        if target.data_ptr() not in covered:
            yield f"{name}: the live model has it, and the models that are merged do not."
