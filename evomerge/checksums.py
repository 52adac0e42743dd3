"""Checksums of tensors: what a candidate's digest is made of.

Integer arithmetic on bits and their positions, so they are the same on every device, in a file, in
a live model, and taken by a kernel as it writes.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import torch

# Steele 2014, "Fast splittable pseudorandom number generators",
# https://doi.org/10.1145/2714064.2660195: golden-ratio step and the multipliers of splitmix64
_STEP = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_CHUNK_BYTES = {"cpu": 2**17, "cuda": 2**25}
"""Sizes where a chunk stays in a core's cache and torch calls no other threads, which costs more
than so small a sum; and where a GPU is kept busy. The checksum does not depend on them."""


class Checksum(NamedTuple):
    """A tensor's share of a candidate's digest."""

    dtype: str
    shape: tuple[int, ...]
    value: int


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's elements as stored, uint8, shape (bytes,), on its device.

    Aliases the tensor where it is contiguous, else a copy of it.
    """
    return tensor.detach().reshape(-1).view(torch.uint8)


def tensor_checksum(
    tensor: torch.Tensor, chunk_bytes: int | None = None, first_byte: int = 0
) -> int:
    """Return a checksum of a tensor's bits and their positions, in [0, 2**64).

    The bits are taken as little-endian 64-bit words w_i, the last one filled up with zeros, and the
    checksum is the sum modulo 2**64 of mix(w_i + i * step), where mix is splitmix64's bijection. A
    change within one word is always seen; other changes are missed with a chance near 2**-64, but
    this is no protection against intent. Integer arithmetic only: the same on every device and for
    every chunk size.

    Args:
        tensor: Any shape, dtype and device; not written to. Copied whole if it is not contiguous.
        chunk_bytes: Bytes looked at together, a multiple of 8; None fits the device. Does not
            change the value.
        first_byte: Where in a larger tensor these bytes begin, a multiple of 8; the checksums of
            its runs, cut at such places, add up to its own modulo 2**64.
    """
    data = as_bytes(tensor)
    chunk = chunk_bytes or _CHUNK_BYTES.get(data.device.type, 2**25)
    chunk = min(chunk, -(-data.numel() // 8) * 8)
    steps = torch.arange(chunk // 8, device=data.device) * _signed(_STEP)
    words, shifted = torch.empty_like(steps), torch.empty_like(steps)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    aligned = data.storage_offset() % 8 == 0 and data.data_ptr() % 8 == 0
    for start in range(0, data.numel(), chunk or 1):
        part = data[start : start + chunk]
        used = -(-part.numel() // 8)
        if aligned and part.numel() % 8 == 0:
            torch.add(part.view(torch.int64), steps[:used], out=words[:used])
        else:
            words[used - 1] = 0
            words.view(torch.uint8)[: part.numel()].copy_(part)
            words[:used] += steps[:used]
        words[:used] += _signed((first_byte + start) // 8 * _STEP)
        total += _mixed(words[:used], shifted[:used]).sum()
    return int(total.item()) % 2**64


def _mixed(words: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
    """Mix int64 words in place, as splitmix64 after its first xor-shift; `shifted` is scratch."""
    words *= _signed(_MIX_1)
    words ^= _shift_right(words, 32, shifted)
    words *= _signed(_MIX_2)
    words ^= _shift_right(words, 29, shifted)
    return words


def _shift_right(words: torch.Tensor, places: int, out: torch.Tensor) -> torch.Tensor:
    # torch shifts the sign in; the mask takes it out again
    torch.bitwise_right_shift(words, places, out=out)
    out &= (1 << (64 - places)) - 1
    return out


def _signed(number: int) -> int:
    """Return the int64 that has the low 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63


def checksum_of(tensor: torch.Tensor) -> Checksum:
    """Return a tensor's checksum with its dtype's name and shape."""
    return Checksum(dtype_name(tensor.dtype), tuple(tensor.shape), tensor_checksum(tensor))


def weights_digest(checksums: Mapping[str, Checksum]) -> str:
    """Return one digest of named tensors, in any order, as 64 hexadecimal digits."""
    rows = [
        [name, entry.dtype, list(entry.shape), entry.value]
        for name, entry in sorted(checksums.items())
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as configs write it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
