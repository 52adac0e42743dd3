"""Carry out a plan: tensors read, put into kernel jobs, and carried out by the launch.

Letters: M models, P elements of one flat tensor.
"""

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
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


class Place(NamedTuple):
    """Memory that a merged tensor is written to.

    Attributes:
        tensor: Contiguous, of the tensor's shape and dtype; overwritten.
        is_new: Whether it was made for this tensor.
    """

    tensor: torch.Tensor
    is_new: bool


@dataclass(frozen=True)
class Output:
    """Where merged tensors go.

    Attributes:
        place: Gives a tensor's place.
        launch_bytes: How much new memory tensors of one launch may take; one tensor may take more.
    """

    place: Callable[[TensorSpec], Place]
    launch_bytes: int


def _new(spec: TensorSpec) -> Place:
    return Place(torch.empty(spec.shape, dtype=spec.dtype), is_new=True)


ONE_BY_ONE = Output(_new, launch_bytes=0)
"""New tensors, in the memory of one of them and its sources."""


class Merger:
    """Carries out plans over one set of models, and keeps what all candidates of a search share.

    Args:
        sources: The models' tensors, as given to `make_plan`; not written to.
        statistics: Facts about these models, filled as needed.
    """

    def __init__(
        self, sources: Mapping[str, TensorSource], statistics: StatisticsCache | None = None
    ) -> None:
        self.sources = sources
        self.statistics = statistics or StatisticsCache()
        self._structures: dict[Hashable, _Structure] = {}

    def execute(
        self, plan: MergePlan, only: Container[str] | None = None, output: Output = ONE_BY_ONE
    ) -> Iterator[Merged]:
        """Yield the merged tensors in the plan's order.

        Args:
            plan: The merge.
            only: Names of the tensors that are wanted; None is all. The others may be read all the
                same, by methods that look at whole models.
            output: Where the tensors go.

        Raises:
            MergeError: An integer or boolean tensor differs between the models.
            NonFiniteError: NaN or Inf in a model, or in the result; names model and tensor.
        """
        return (merged for (merged,) in self.execute_together([plan], only, [output]))

    def execute_together(
        self, plans: Sequence[MergePlan], only: Container[str] | None, outputs: Sequence[Output]
    ) -> Iterator[tuple[Merged, ...]]:
        """Yield each merged tensor of K recipes at once: what they share is read once.

        Args:
            plans: The merges, with the same tensors in all of them.
            only: As for `execute`.
            outputs: Where each merge's tensors go. The smallest `launch_bytes` counts.

        Raises:
            MergeError, NonFiniteError: As `execute`; or the merges have other tensors.
        """
        most_bytes = min(output.launch_bytes for output in outputs)
        structures = [self._structure(plan) for plan in plans]
        ready: list[tuple[_Ready, ...]] = []
        new_bytes = 0
        for jobs in _alike(plans):
            if only is not None and jobs[0].spec.name not in only:
                continue
            ready.append(self._prepared(plans, jobs, structures, outputs))
            new_bytes += sum(each.new_bytes for each in ready[-1])
            if new_bytes > most_bytes:
                merged = _launched(ready)
                # nothing read is held while the consumer has the tensors
                ready, new_bytes = [], 0
                yield from merged
                del merged
        yield from _launched(ready)

    def _prepared(
        self,
        plans: Sequence[MergePlan],
        jobs: Sequence[TensorJob],
        structures: "Sequence[_Structure]",
        outputs: Sequence[Output],
    ) -> "tuple[_Ready, ...]":
        read: _Read = {}
        return tuple(
            self._ready(plan, job, structure, output.place(job.spec), read)
            for plan, job, structure, output in zip(plans, jobs, structures, outputs, strict=True)
        )

    def _ready(
        self, plan: MergePlan, job: TensorJob, structure: "_Structure", place: Place, read: "_Read"
    ) -> "_Ready":
        out = place.tensor
        num_read = len(read)
        if job.values is None:
            out.copy_(_copied(job, self._read(job, read)))
            return _Ready(job.spec, out, None, 0)
        facts = self._facts(plan, job, structure, read)
        table = plan.method.table(job.values, facts)
        dither = plan.dither(job.spec)
        kernel = KernelJob(table, facts.base_P, facts.source_MP, out.view(-1), dither)
        new = [tensor for tensor, held in list(read.values())[num_read:] if not held]
        new_bytes = sum(tensor.nbytes for tensor in new) + place.is_new * out.nbytes
        return _Ready(job.spec, out, kernel, new_bytes)

    def _facts(
        self, plan: MergePlan, job: TensorJob, structure: "_Structure", read: "_Read"
    ) -> TensorStatistics:
        key = (job.spec.name, plan.recipe.mask_seed, plan.recipe.threshold_ties)
        kept = structure.held.get(key)
        if kept is not None:
            return kept
        tensors = self._read(job, read)
        for source, tensor in zip(job.inputs, tensors, strict=True):
            _check_source(source, tensor.reshape(-1), self.statistics)
        facts = _statistics(plan, job, tensors, self.statistics, structure.everything)
        if all(self.sources[source.model].holds_tensors for source in job.inputs):
            structure.held[key] = facts
        return facts

    def _read(self, job: TensorJob, read: "_Read") -> list[torch.Tensor]:
        for source in job.inputs:
            if source not in read:
                model = self.sources[source.model]
                read[source] = model.read(source.name), model.holds_tensors
        return [read[source][0] for source in job.inputs]

    def _structure(self, plan: MergePlan) -> "_Structure":
        inputs = tuple((job.spec.name, job.base, job.parents) for job in plan.jobs)
        if inputs not in self._structures:
            everything = Everything(inputs, lambda: self._each(plan, everything))
            self._structures[inputs] = _Structure(everything, {})
        return self._structures[inputs]

    def _each(self, plan: MergePlan, everything: Everything) -> Iterator[TensorStatistics]:
        """Yield the statistics of every merged tensor, which must be of the same models."""
        jobs = [job for job in plan.jobs if job.values is not None]
        models = [source.model for source in jobs[0].parents]
        for job in jobs:
            if [source.model for source in job.parents] != models:
                raise MergeError(
                    f"{job.spec.name}: other models than in {jobs[0].spec.name}, and this merge "
                    "looks at all tensors of a model together. Merge the same models in every "
                    "slice, or set trim_whole_model: false."
                )
            yield _statistics(plan, job, self._read(job, {}), self.statistics, everything)


class _Structure(NamedTuple):
    """What plans share that read the same tensors.

    Attributes:
        everything: Those tensors.
        held: Statistics by tensor, mask seed and what becomes of ties, of tensors that their
            sources hold anyway.
    """

    everything: Everything
    held: dict[tuple[str, int, str], TensorStatistics]


_Read = dict[TensorInput, tuple[torch.Tensor, bool]]
"""What was read for one tensor, and whether its source holds it anyway."""


def execute(
    plan: MergePlan,
    sources: Mapping[str, TensorSource],
    statistics: StatisticsCache,
    only: Container[str] | None = None,
    output: Output = ONE_BY_ONE,
) -> Iterator[Merged]:
    """Yield the merged tensors of one plan; see `Merger.execute`."""
    return Merger(sources, statistics).execute(plan, only, output)


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


def _alike(plans: Sequence[MergePlan]) -> Iterator[tuple[TensorJob, ...]]:
    names = [[job.spec.name for job in plan.jobs] for plan in plans]
    for other in names[1:]:
        if other != names[0]:
            name = next(iter(set(names[0]).symmetric_difference(other)))
            raise MergeError(
                f"{name}: not in every one of the recipes, which are merged together. Merge "
                "recipes of one depth and vocabulary, or one after another."
            )
    return zip(*(plan.jobs for plan in plans), strict=True)


def _launched(ready: "Sequence[tuple[_Ready, ...]]") -> list[tuple[Merged, ...]]:
    kernels = [each.kernel for group in ready for each in group if each.kernel is not None]
    written, ran = dispatch.carry_out_all(kernels)
    told = iter(written)
    return [
        tuple(
            Merged(each.spec.name, each.out, _checksum(each, told if each.kernel else None), ran)
            for each in group
        )
        for group in ready
    ]


def _checksum(ready: _Ready, told: Iterator[Written] | None) -> Checksum:
    if told is None:
        return checksum_of(ready.out)
    written = next(told)
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
        plan.recipe.threshold_ties,
    )


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
