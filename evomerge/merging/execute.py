"""Carry out a plan tensor by tensor, in the memory of one tensor and the sources' own."""

from collections.abc import Iterator, Mapping

import torch

from evomerge.checkpoints.source import TensorSource
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels import reference
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics, is_finite
from evomerge.merging.plan import MergePlan
from evomerge.methods.method import Values


def execute(
    plan: MergePlan, sources: Mapping[str, TensorSource], statistics: StatisticsCache
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the merged tensors in the plan's order.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`; not written to.
        statistics: Facts about these models, filled as needed. One cache serves any number of
            recipes over the same models.

    Yields:
        Name and a new tensor on the CPU, in the dtype of its job.

    Raises:
        MergeError: An integer or boolean tensor differs between the models.
        NonFiniteError: NaN or Inf in a model, or in the result; names model and tensor.
    """
    for job in plan.jobs:
        name = job.spec.name
        read = {model: sources[model].read(name) for model in plan.models}
        if job.values is None:
            yield name, _copied(plan, name, read)
        else:
            out = torch.empty(job.spec.shape, dtype=job.spec.dtype)
            _merge(plan, name, job.values, read, statistics, out)
            yield name, out


def _copied(plan: MergePlan, name: str, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
    donor = str(plan.recipe.donor)
    for model, tensor in read.items():
        if not torch.equal(tensor, read[donor]):
            raise MergeError(
                f"{name}: holds integers or booleans, which are copied and not merged, and those "
                f"of {model} and {donor} differ. Check that the models have one origin."
            )
    return read[donor].clone()


def _merge(
    plan: MergePlan,
    name: str,
    values: Values,
    read: Mapping[str, torch.Tensor],
    cache: StatisticsCache,
    out: torch.Tensor,
) -> None:
    out_P, shape = out.view(-1), tuple(out.shape)
    flat = {model: tensor.reshape(-1) for model, tensor in read.items()}
    for model, tensor_P in flat.items():
        _check_source(name, model, tensor_P, cache)
    base_P = None if plan.base is None else flat[plan.base]
    source_MP = [flat[model] for model in plan.parents]
    statistics = TensorStatistics(
        name,
        base_P,
        source_MP,
        plan.base,
        plan.parents,
        plan.recipe.mask_seed,
        cache,
        shape=shape,
    )
    table = plan.method.table(values, statistics)
    reference.carry_out(table, base_P, source_MP, out_P)
    if not is_finite(out_P):
        dtype = str(out_P.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{name}: the merge does not fit into {dtype}. Use smaller weights, or another dtype."
        )


def _check_source(name: str, model: str, tensor_P: torch.Tensor, cache: StatisticsCache) -> None:
    # looked at once per search, not once per candidate
    if not cache.fact(("finite", name, model), lambda: is_finite(tensor_P)):
        raise NonFiniteError(
            f"{name}: {model} holds NaN or Inf here. Mend the checkpoint, or leave the model out."
        )
