"""Launches of the Triton kernels on CUDA devices.

Jobs of one kind go in one launch, wherever their tensors lie; those that share their sources, as
those of a population do, are carried out over one read of them. A launch costs one copy to the
device, and all launches on a device together one copy back.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch

from evomerge.kernels.launch import KernelJob, Written
from evomerge.kernels.tables import Mask
from evomerge.kernels.triton_pack import (
    Batch,
    Variant,
    batches,
    blocks_of,
    can_pack,
    first_blocks,
    mask_features,
    pack,
    variant_of,
)

WARPS = 4
"""Warps of one program of `BLOCK` elements."""

WORDS = 2048
"""64-bit words of one program that takes checksums."""

SLOTS = 32
"""Places among which the sums of one tensor are spread, so that programs do not queue."""

_EXPONENTS = {
    torch.bfloat16: (0x7F80_7F80_7F80_7F80, 0x0080_0080_0080_0080),
    torch.float16: (0x7C00_7C00_7C00_7C00, 0x0400_0400_0400_0400),
    torch.float32: (0x7F80_0000_7F80_0000, 0x0080_0000_0080_0000),
}
_FEATURES = {
    "span": ("DELTAS",),
    "mask": ("ELECT", "NORMALIZE", "CEILINGS", "THRESHOLDS", "DRAWS", "RANKS", "CUTS"),
    "local": (),
}


def missing() -> str | None:
    """Say why the kernels cannot run on this machine; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. pip install 'evomerge[gpu]'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def can_run(job: KernelJob) -> bool:
    """Whether there is a kernel for a job, and all its tensors lie on one CUDA device."""
    return job.out_P.is_cuda and can_pack(job)


def carry_out_all(jobs: Sequence[KernelJob]) -> list[Written]:
    """Carry out jobs that can run; see `dispatch.carry_out_all`."""
    by_device = defaultdict(list)
    for place, job in enumerate(jobs):
        if len(job.out_P):
            by_device[job.out_P.device].append(place)
    written = [Written(0, True)] * len(jobs)
    for device, places in by_device.items():
        here = [jobs[place] for place in places]
        with _on(device):
            merge(here, device)
            told = _written(here, device)
        for place, each in zip(places, told, strict=True):
            written[place] = each
    return written


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device; the interpreter has none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def merge(jobs: Sequence[KernelJob], device: torch.device) -> None:
    """Carry out jobs of one device, which is current, and wait for nothing."""
    alike: dict[Variant, list[Batch]] = defaultdict(list)
    for places in batches(jobs):
        batch = [jobs[place] for place in places]
        alike[variant_of(batch)].append(batch)
    for variant, batches_T in alike.items():
        _launch(with_features(variant, batches_T), batches_T, device)


def with_features(variant: Variant, batches_T: Sequence[Batch]) -> Variant:
    """Return a variant with what any mask of a launch has."""
    tables = [job.table for batch in batches_T for job in batch if isinstance(job.table, Mask)]
    features = variant.features.union(*map(mask_features, tables))
    return dataclasses.replace(variant, features=features)


def _launch(variant: Variant, batches_T: Sequence[Batch], device: torch.device) -> None:
    blocks = blocks_of([len(batch[0].out_P) for batch in batches_T], variant.block)
    integers, numbers = _uploaded(*pack(batches_T, blocks), device=device)
    kernel, constants = kernel_of(variant)
    kernel[(sum(blocks),)](
        _block_table(blocks, device),
        integers,
        numbers,
        **constants,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def kernel_of(variant: Variant) -> tuple[Any, dict[str, object]]:
    """Return the kernel and its constants by name. Needs triton."""
    kernels = _triton_kernels()
    constants: dict[str, object] = {
        "M": variant.models,
        "K": variant.candidates,
        "SOURCE": kernels.DTYPES[variant.source],
        "BASE": None if variant.base is None else kernels.DTYPES[variant.base],
        "OUT": kernels.DTYPES[variant.out],
        "DITHER": variant.dither,
        "BY_INTEGERS": kernels.INTERPRETED,
        "BLOCK": variant.block,
    }
    constants |= {name: name in variant.features for name in _FEATURES[variant.kernel]}
    if variant.kernel == "local":
        constants["METHOD"] = variant.method
    return getattr(kernels, f"{variant.kernel}_kernel"), constants


def _triton_kernels() -> ModuleType:
    """Import triton only where something is launched or compiled."""
    return importlib.import_module("evomerge.kernels.triton_kernels")


def _uploaded(
    integers: np.ndarray, numbers: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy two tables to a device at once; return them flat, each at a multiple of 16 bytes."""
    start = -(-integers.nbytes // 16) * 16
    pin = device.type == "cuda"
    staged = torch.empty(start + numbers.nbytes, dtype=torch.uint8, pin_memory=pin)
    staged[: integers.nbytes] = torch.from_numpy(integers.reshape(-1).view(np.uint8))
    staged[start:] = torch.from_numpy(numbers.reshape(-1).view(np.uint8))
    tables = staged.to(device, non_blocking=True)
    return tables[: integers.nbytes].view(torch.int64), tables[start:].view(torch.float32)


@functools.lru_cache(maxsize=8)
def _block_table(blocks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the tensor of each block, int32; kept, since it is the same for every candidate."""
    tensors = torch.arange(len(blocks), dtype=torch.int32)
    return torch.repeat_interleave(tensors, torch.tensor(blocks)).to(device)


def _written(jobs: Sequence[KernelJob], device: torch.device) -> list[Written]:
    """Return checksums of what jobs wrote, and whether it is finite."""
    num_bytes = [job.out_P.nbytes for job in jobs]
    blocks = blocks_of(num_bytes, 8 * WORDS)
    rows = [
        (job.out_P.data_ptr(), size, first, job.first * job.out_P.itemsize // 8)
        + _EXPONENTS[job.out_P.dtype]
        for job, size, first in zip(jobs, num_bytes, first_blocks(blocks), strict=True)
    ]
    integers, _ = _uploaded(np.array(rows, np.int64), np.empty(0, np.float32), device)
    totals = torch.zeros((SLOTS, 2, len(jobs)), dtype=torch.int64, device=device)
    _triton_kernels().written_kernel[(sum(blocks),)](
        _block_table(blocks, device),
        integers,
        totals,
        len(jobs),
        SLOTS=SLOTS,
        BLOCK=WORDS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    checksums, wrong = totals.sum(0).tolist()
    pairs = zip(checksums, wrong, strict=True)
    return [Written(checksum % 2**64, num_wrong == 0) for checksum, num_wrong in pairs]
