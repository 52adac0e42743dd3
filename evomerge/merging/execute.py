"""Carry out a plan: tensors read, put into kernel jobs, and carried out by the launch.

Letters: M models, P elements of one flat tensor.
"""

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evomerge.checkpoints.shards import TensorSpec
from evomerge.checkpoints.source import TensorSource
from evomerge.checksums import Checksum, checksum_of, dtype_name
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels import dispatch, reference
from evomerge.kernels.launch import KernelJob, Written
from evomerge.kernels.statistics import Everything, StatisticsCache, TensorStatistics
from evomerge.merging.plan import MergePlan, TensorInput, TensorJob


class Merged(NamedTuple):
    """A merged tensor.

    Attributes:
        name: Its name on disk.
        tensor: Its elements.
        checksum: What it adds to the digest of the weights.
        kernels: Which implementations of the kernels ran in the launch that made it.
    """

    name: str
    tensor: torch.Tensor
    checksum: Checksum
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """Where merged tensors go.

    Attributes:
        place: Gives a contiguous tensor of a shape and dtype to be overwritten.
        launch_bytes: How much new memory tensors of one launch may take; one tensor may take more.
    """

    place: Callable[[TensorSpec], torch.Tensor]
    launch_bytes: int


def _new(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype)


ONE_BY_ONE = Output(_new, launch_bytes=0)
"""New tensors, in the memory of one of them and its sources."""


def execute(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    only: Container[str] | None = None,
    output: Output = ONE_BY_ONE,
) -> Iterator[Merged]:
    """Yield the merged tensors in the plan's order.

    Args:
        plan: The merge.
        sources: The models' tensors, as given to `make_plan`; not written to.
        statistics: Facts about these models, filled as needed. One cache serves any number of
            recipes over the same models.
        only: Names of the tensors that are wanted; None is all. The others may be read all the
            same, by methods that look at whole models.
        output: Where the tensors go.

    Raises:
        MergeError: An integer or boolean tensor differs between the models.
        NonFiniteError: NaN or Inf in a model, or in the result; names model and tensor.
    """
    everything = _everything(plan, sources, statistics)
    ready: list[_Ready] = []
    for job in plan.jobs:
        if only is None or job.spec.name in only:
            ready.append(_prepared(plan, job, sources, statistics, everything, output))
            if sum(each.new_bytes for each in ready) > output.launch_bytes:
                merged = _launched(ready)
                ready.clear()  # nothing read is held while the consumer has the tensors
                yield from merged
    yield from _launched(ready)


def merged_tensors(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    only: Container[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the merged tensors by name, all in memory; see `execute`."""
    return {each.name: each.tensor for each in execute(plan, sources, statistics, only)}


class _Ready(NamedTuple):
    spec: TensorSpec
    out: torch.Tensor
    kernel: KernelJob | None
    new_bytes: int


def _prepared(
    plan: MergePlan,
    job: TensorJob,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    everything: Everything,
    output: Output,
) -> _Ready:
    read = [sources[source.model].read(source.name) for source in job.inputs]
    out = output.place(job.spec)
    new_bytes = out.nbytes + sum(
        tensor.nbytes
        for tensor, source in zip(read, job.inputs, strict=True)
        if not sources[source.model].holds_tensors
    )
    if job.values is None:
        out.copy_(_copied(job, read))
        return _Ready(job.spec, out, None, new_bytes)
    for source, tensor in zip(job.inputs, read, strict=True):
        _check_source(source, tensor.reshape(-1), statistics)
    facts = _statistics(plan, job, read, statistics, everything)
    table = plan.method.table(job.values, facts)
    kernel = KernelJob(table, facts.base_P, facts.source_MP, out.view(-1))
    return _Ready(job.spec, out, kernel, new_bytes)


def _launched(ready: Sequence[_Ready]) -> list[Merged]:
    kernels = [each.kernel for each in ready if each.kernel is not None]
    written, ran = dispatch.carry_out_all(kernels)
    told = iter(written)
    return [
        Merged(each.spec.name, each.out, _checksum(each, next(told) if each.kernel else None), ran)
        for each in ready
    ]


def _checksum(ready: _Ready, written: Written | None) -> Checksum:
    if written is None:
        return checksum_of(ready.out)
    dtype = dtype_name(ready.out.dtype)
    if not written.is_finite:
        raise NonFiniteError(
            f"{ready.spec.name}: the merge does not fit into {dtype}. Use smaller weights, or "
            "another dtype."
        )
    return Checksum(dtype, ready.spec.shape, written.checksum)


def _copied(job: TensorJob, read: Sequence[torch.Tensor]) -> torch.Tensor:
    for source, tensor in zip(job.inputs, read, strict=True):
        if not torch.equal(tensor, read[0]):
            raise MergeError(
                f"{job.spec.name}: holds integers or booleans, which are copied and not merged, "
                f"and those of {source.model} and {job.inputs[0].model} differ. Check that the "
                "models have one origin."
            )
    return read[0]


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
