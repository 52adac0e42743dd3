"""Carry out a plan tensor by tensor, in the memory of one tensor and the sources' own.

Letters: M models, P elements of one flat tensor.
"""

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence

import torch

from evomerge.checkpoints.source import TensorSource
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels import reference
from evomerge.kernels.statistics import Everything, StatisticsCache, TensorStatistics
from evomerge.merging.plan import MergePlan, TensorInput, TensorJob


def execute(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the merged tensors in the plan's order.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`; not written to.
        statistics: Facts about these models, filled as needed. One cache serves any number of
            recipes over the same models.
        only: Names of the tensors that are wanted; None is all. The others may be read all the
            same, by methods that look at whole models.

    Yields:
        Name and a new tensor on the CPU, in the dtype of its job.

    Raises:
        MergeError: An integer or boolean tensor differs between the models.
        NonFiniteError: NaN or Inf in a model, or in the result; names model and tensor.
    """
    everything = _everything(plan, sources, statistics)
    for job in plan.jobs:
        if only is None or job.spec.name in only:
            # nothing read is held while the consumer has the tensor
            yield job.spec.name, _made(plan, job, sources, statistics, everything)


def _made(
    plan: MergePlan,
    job: TensorJob,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    everything: Everything,
) -> torch.Tensor:
    read = [sources[model].read(name) for model, name in job.inputs]
    if job.values is None:
        return _copied(job, read)
    out = torch.empty(job.spec.shape, dtype=job.spec.dtype)
    for source, tensor in zip(job.inputs, read, strict=True):
        _check_source(source, tensor.reshape(-1), statistics)
    facts = _statistics(plan, job, read, statistics, everything)
    table = plan.method.table(job.values, facts)
    reference.carry_out(table, facts.base_P, facts.source_MP, out.view(-1))
    if not reference.is_finite(out.view(-1)):
        dtype = str(out.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{job.spec.name}: the merge does not fit into {dtype}. Use smaller weights, or "
            "another dtype."
        )
    return out


def _copied(job: TensorJob, read: Sequence[torch.Tensor]) -> torch.Tensor:
    for source, tensor in zip(job.inputs, read, strict=True):
        if not torch.equal(tensor, read[0]):
            raise MergeError(
                f"{job.spec.name}: holds integers or booleans, which are copied and not merged, "
                f"and those of {source.model} and {job.inputs[0].model} differ. Check that the "
                "models have one origin."
            )
    return read[0].clone()


def _statistics(
    plan: MergePlan,
    job: TensorJob,
    read: Sequence[torch.Tensor],
    cache: StatisticsCache,
    everything: Everything,
) -> TensorStatistics:
    read_MP = [tensor.reshape(-1) for tensor in read]
    base_P, source_MP = (None, read_MP) if job.base is None else (read_MP[0], read_MP[1:])
    return TensorStatistics(
        job.spec.name,
        base_P,
        source_MP,
        None if job.base is None else _label(job, job.base),
        tuple(_label(job, source) for source in job.parents),
        plan.recipe.mask_seed,
        cache,
        job.spec.shape,
        everything,
    )


def _everything(
    plan: MergePlan, sources: Mapping[str, TensorSource], cache: StatisticsCache
) -> Everything:
    inputs = [(job.spec.name, job.inputs) for job in plan.jobs]
    name = hashlib.sha256(repr(inputs).encode()).hexdigest()
    everything = Everything(name, lambda: _each(plan, sources, cache, everything))
    return everything


def _each(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    cache: StatisticsCache,
    everything: Everything,
) -> Iterator[TensorStatistics]:
    """Yield the statistics of every merged tensor, which must be of the same models."""
    jobs = [job for job in plan.jobs if job.values is not None]
    models = [source.model for source in jobs[0].parents]
    for job in jobs:
        if [source.model for source in job.parents] != models:
            raise MergeError(
                f"{job.spec.name}: other models than in {jobs[0].spec.name}, and this merge looks "
                "at all tensors of a model together. Merge the same models in every slice, or set "
                "trim_whole_model: false."
            )
        read = [sources[source.model].read(source.name) for source in job.inputs]
        yield _statistics(plan, job, read, cache, everything)


def _label(job: TensorJob, source: TensorInput) -> str:
    # facts are kept under the merged tensor's name and these: with stacked layers a model alone
    # does not say what was read
    same = source.name == job.spec.name
    return source.model if same else f"{source.name} of {source.model}"


def _check_source(source: TensorInput, tensor_P: torch.Tensor, cache: StatisticsCache) -> None:
    # looked at once per search, not once per candidate
    if not cache.fact(("finite", source.name, source.model), lambda: reference.is_finite(tensor_P)):
        raise NonFiniteError(
            f"{source.name}: {source.model} holds NaN or Inf here. Mend the checkpoint, or leave "
            "the model out."
        )
