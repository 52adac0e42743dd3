"""Memory plan: where a search's sources are going to lie, and what it costs where they do not fit.

From sizes alone; no tensor is read.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from evomerge.checkpoints.source import TensorSource
from evomerge.kernels.statistics import StatisticsCache
from evomerge.kernels.streamed import SCRATCH_BYTES

SPARE = 0.1
"""Share of a memory that is kept free, on a device for activations and caches. An assumption: what
they take depends on batch size and lengths. While weights are merged, larger pieces of streamed
sources than `SCRATCH_BYTES` have this room too."""

PINNED_BYTES_PER_S = 50e9
"""Assumed rate from pinned host memory to a GPU: PCIe 5 with 16 lanes. Half of it on PCIe 4."""

MAPPED_BYTES_PER_S = 10e9
"""Assumed rate from mapped files in the page cache to a GPU: one core copies them on the way."""

RANKED = ("della", "della_linear")
"""Methods that keep a byte for each element of each parent."""

KEPT_MERGED = ("iso_c", "tsv")
"""Methods that keep one float32 number for each element, as far as there is room."""

KEPT_PARENTS = ("fourier",)
"""Methods that keep one float32 number for each element of each parent, as far as there is room."""

Choice = Literal["mapped", "resident", "streamed", "too large", "unknown"]
"""Where sources are: in mapped files, on the device, in host memory and copied piece by piece for
each candidate; `too large`: not even the live model fits; `unknown`: there is no such device here.
"""


@dataclass(frozen=True)
class Memory:
    """A memory as it is now."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Needs:
    """What a worker has to have somewhere.

    Attributes:
        source_bytes: Of each model that a candidate reads, by name.
        live_bytes: Of the live model.
        rank_bytes: Of the elements' ranks; they lie where the sources do.
        kept_bytes: Of other tensors that a method computes once; they lie on the device.
    """

    source_bytes: Mapping[str, int]
    live_bytes: int
    rank_bytes: int = 0
    kept_bytes: int = 0

    @property
    def table_bytes(self) -> int:
        """Bytes of all that is computed once."""
        return self.rank_bytes + self.kept_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that a candidate reads."""
        return sum(self.source_bytes.values()) + self.rank_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Where a search's sources are going to lie.

    Attributes:
        needs: What each worker has to have.
        choice: See `Choice`.
        why: One sentence for the user.
        left_bytes: What stays free for each worker's activations; None where it is not known.
        pinned: Whether streamed sources are copied into pinned host memory first, by each worker;
            else they are copied from mapped files.
        streaming_s: Seconds that streaming adds to each candidate; 0 where nothing is streamed.
    """

    needs: Needs
    choice: Choice
    why: str
    left_bytes: int | None
    pinned: bool = False
    streaming_s: float = 0.0


def needs_of(
    sources: Mapping[str, TensorSource], donor: str, out_dtype: torch.dtype, method: str
) -> Needs:
    """Work out what a search needs from names, shapes and dtypes.

    Args:
        sources: Every model that a candidate reads.
        donor: The one whose shapes the live model has.
        out_dtype: Dtype of the live model.
        method: Name of the merge method.
    """
    elements = {
        name: sum(math.prod(source.shape(tensor)) for tensor in source.names())
        for name, source in sources.items()
    }
    of_parents = sum(elements.values()) - elements[donor]
    kept = 4 * (elements[donor] if method in KEPT_MERGED else of_parents)
    keeps = method in KEPT_MERGED or method in KEPT_PARENTS
    return Needs(
        source_bytes={name: sum(_sizes(source)) for name, source in sources.items()},
        live_bytes=sum(_sizes(sources[donor], out_dtype)),
        rank_bytes=of_parents if method in RANKED else 0,
        kept_bytes=min(kept, StatisticsCache().max_tensor_bytes) if keeps else 0,
    )


def _sizes(source: TensorSource, dtype: torch.dtype | None = None) -> Iterable[int]:
    """Yield each tensor's bytes, in another floating dtype if one is given."""
    for name in source.names():
        stored = source.dtype(name)
        held = dtype if dtype and stored.is_floating_point else stored
        yield math.prod(source.shape(name)) * held.itemsize


def host_memory() -> Memory | None:
    """Return this machine's memory, what caches could give back counted as free; None if unknown.

    What a container limits is not seen.
    """
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    rows = (line.split() for line in path.read_text().splitlines())
    kib = {row[0]: int(row[1]) for row in rows}
    return Memory(kib["MemAvailable:"] * 1024, kib["MemTotal:"] * 1024)


def gpu_memory() -> Memory | None:
    """Return the memory of this machine's GPU that has the least of it free; None without one."""
    found = [Memory(*torch.cuda.mem_get_info(i)) for i in range(torch.cuda.device_count())]
    return min(found, key=lambda memory: memory.free_bytes, default=None)


def memory_plan(
    needs: Needs, workers: int, gpus: float, host: Memory | None, gpu: Memory | None
) -> MemoryPlan:
    """Choose where the sources lie.

    On a CPU they stay in mapped files: the page cache is the one copy that all workers of a machine
    read. On a GPU they are resident if everything fits beside what is kept for activations.

    Args:
        needs: What each worker has to have.
        workers: How many run on this machine.
        gpus: GPUs of a worker; 0 is the CPU, below 1 several share one, above 1 counts as 1, since
            a worker computes on one.
        host: This machine's memory; None if unknown.
        gpu: The memory of its GPU; None without one.
    """
    if gpus > 0:
        return _on_gpu(needs, workers, min(gpus, 1.0), host, gpu)
    return _on_cpu(needs, workers, host)


def _on_gpu(
    needs: Needs, workers: int, share: float, host: Memory | None, gpu: Memory | None
) -> MemoryPlan:
    streaming = needs.live_bytes + needs.kept_bytes + 2 * SCRATCH_BYTES
    resident = needs.live_bytes + needs.table_bytes + sum(needs.source_bytes.values())
    if gpu is None:
        why = f"this machine has no GPU; a worker needs {gib(resident)} of one"
        if streaming < resident:
            why += f", or {gib(streaming)} if sources are streamed,"
        return MemoryPlan(needs, "unknown", f"{why} and memory for activations", None)
    free, spare = int(gpu.free_bytes * share), int(gpu.total_bytes * share * SPARE)
    if resident + spare <= free:
        why = f"all of it fits, and more is left than the {gib(spare)} kept for activations"
        return MemoryPlan(needs, "resident", why, free - resident)
    if streaming + spare <= free:
        return _streamed(needs, workers, host, free - streaming, resident + spare - free)
    why = (
        f"without sources a worker needs {gib(streaming + spare)}, {gib(spare)} of it for "
        f"activations, and {gib(free)} are free for it; let fewer workers share a GPU "
        "(workers.gpus), or merge smaller models"
    )
    return MemoryPlan(needs, "too large", why, max(0, free - streaming))


def _on_cpu(needs: Needs, workers: int, host: Memory | None) -> MemoryPlan:
    own, shared = workers * (needs.live_bytes + needs.table_bytes), sum(needs.source_bytes.values())
    why = "the page cache holds the files once for all workers of a machine"
    if host is None:
        return MemoryPlan(needs, "mapped", why, None)
    if own > (1 - SPARE) * host.free_bytes:
        why = (
            f"live models and tables need {gib(own)} in all, and {gib(host.free_bytes)} are free; "
            "use fewer workers (workers.count), or merge smaller models"
        )
        return MemoryPlan(needs, "too large", why, max(0, host.free_bytes - own) // workers)
    if own + shared > host.free_bytes:
        why = "not all files fit into memory, so every candidate reads some from disk again"
        return MemoryPlan(needs, "mapped", why, (host.free_bytes - own) // workers)
    return MemoryPlan(needs, "mapped", why, (host.free_bytes - own - shared) // workers)


def _streamed(
    needs: Needs, workers: int, host: Memory | None, left: int, lacking: int
) -> MemoryPlan:
    # torch rounds pinned buffers up to powers of two
    locked = workers * sum(
        2 ** math.ceil(math.log2(max(size, 1))) for size in needs.source_bytes.values()
    )
    pinned = host is not None and locked <= (1 - SPARE) * host.free_bytes
    rate = PINNED_BYTES_PER_S if pinned else MAPPED_BYTES_PER_S
    seconds = needs.read_bytes / rate
    where = (
        f"they wait in {gib(locked)} of pinned host memory"
        if pinned
        else "they come from mapped files, since host memory has no room for pinned copies"
    )
    why = (
        f"{gib(lacking)} are lacking to hold them on the GPU; {where}, and each candidate takes "
        f"{seconds:.2g} s to copy them at an assumed {rate / 1e9:g} GB/s"
    )
    return MemoryPlan(needs, "streamed", why, left, pinned, seconds)


def gib(num_bytes: float) -> str:
    """Return a number of bytes as text, in GiB, or in MiB where it is small."""
    if abs(num_bytes) < 2**29:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"
