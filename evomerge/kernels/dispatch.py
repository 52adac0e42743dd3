"""Dispatch: which implementation of the kernels carries out a job. All of them give equal bits.

To add one: a file with `can_run` and `carry_out_all`, and its row in `KERNELS`, the most wanted
first. The contract in `tests/contracts/kernel.py` follows from the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from evomerge.kernels import native, reference, streamed, triton_launch
from evomerge.kernels.launch import KernelJob, Written


@dataclass(frozen=True)
class Kernels:
    """An implementation of the kernels.

    Attributes:
        name: As recorded with every candidate.
        missing: Says why this machine cannot run it; None where it can.
        can_run: Whether it has a kernel for a job, and can reach the job's memory.
        carry_out_all: As `dispatch.carry_out_all`, for jobs it can run.
    """

    name: str
    missing: Callable[[], str | None]
    can_run: Callable[[KernelJob], bool]
    carry_out_all: Callable[[Sequence[KernelJob]], list[Written]]


def _never_missing() -> str | None:
    return None


def _any(job: KernelJob) -> bool:
    return True


def _on_one_device(jobs: Sequence[KernelJob]) -> list[Written]:
    return carry_out_all(jobs)[0]


STREAMED = Kernels(
    "streamed",
    _never_missing,
    streamed.can_run,
    partial(streamed.carry_out_all, launch=_on_one_device),
)

TRITON = Kernels(
    "triton", triton_launch.missing, triton_launch.can_run, triton_launch.carry_out_all
)

REFERENCE = Kernels("reference", _never_missing, _any, reference.carry_out_all)

NATIVE = Kernels("native", native.missing, native.can_run, native.carry_out_all)

KERNELS: tuple[Kernels, ...] = (STREAMED, TRITON, NATIVE, REFERENCE)
"""Every implementation; the first that can run a job does."""


def for_device(device: str) -> tuple[str, str | None]:
    """Return which implementation runs on `cpu` or `cuda`, and why no faster one does, if so."""
    wanted = TRITON if device == "cuda" else NATIVE
    why_not = wanted.missing()
    return (wanted.name, None) if why_not is None else (REFERENCE.name, why_not)


def carry_out_all(jobs: Sequence[KernelJob]) -> tuple[list[Written], tuple[str, ...]]:
    """Carry out jobs, each by the first implementation that can.

    Jobs may share sources, as those of several recipes do; no job reads what another writes.

    Args:
        jobs: In any order.

    Returns:
        What was written, in the jobs' order; and the names of the implementations that ran, sorted.
    """
    usable = [kernels for kernels in KERNELS if kernels.missing() is None]
    chosen = [next(kernels for kernels in usable if kernels.can_run(job)) for job in jobs]
    written: dict[int, Written] = {}
    for kernels in usable:
        places = [i for i, choice in enumerate(chosen) if choice is kernels]
        if places:
            done = kernels.carry_out_all([jobs[i] for i in places])
            written.update(zip(places, done, strict=True))
    return [written[i] for i in range(len(jobs))], tuple(sorted({each.name for each in chosen}))
