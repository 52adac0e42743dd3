"""The merge kernels on a CUDA device: build, equality with the reference, and times, in one call.

`python -m benchmarks.gpu` needs torch and triton alone, and ends with 1 if any bit differs. Times
are medians of rounds that alternate with the device's own copy, by CUDA events. What a merge must
move is every source, the base and the output once; its fraction is how near it comes to the
bandwidth of the copy, which reads and writes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from evomerge.checksums import tensor_checksum
from evomerge.kernels import reference, triton_launch
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.tables import KernelTable, Mask, Span

MODEL = 7_241_732_096
"""Parameters of a 7B model, for which times are told."""

COPY_BYTES = 2**32
"""Read and written by the copy that bandwidth is measured with."""

LAYER = ((4096, 4096),) * 2 + ((1024, 4096),) * 2 + ((14336, 4096),) * 3 + ((4096,),) * 2
ENDS = ((32000, 4096), (32000, 4096), (4096,))
ALIGNED = 2048
CHECKED = 4_000_000
WEIGHTS = (0.3, 0.45, 0.2, 0.1, 0.25, 0.15, 0.05, 0.35)


def span(models: int, candidate: int, name: str, ranks: list[torch.Tensor]) -> KernelTable:
    """Task vectors, summed."""
    weights = tuple(weight * (1 + candidate / 8) for weight in WEIGHTS[:models])
    return Span(weights, 1.0, deltas=True)


def dare(models: int, candidate: int, name: str, ranks: list[torch.Tensor]) -> Mask:
    """Random elements of the task vectors, summed."""
    weights = WEIGHTS[:models]
    levels = (2**31 + candidate,) * models
    return Mask(weights, weights, (0.0,) * models, levels, MaskKey(7, name))


def ties(models: int, candidate: int, name: str, ranks: list[torch.Tensor]) -> Mask:
    """The larger half of the task vectors, by elected sign."""
    weights, whole = WEIGHTS[:models], (KEEP_ALL,) * models
    thresholds = (0.00067,) * models
    return Mask(weights, weights, thresholds, whole, MaskKey(7, name), elect=True, normalize=True)


def della(models: int, candidate: int, name: str, ranks: list[torch.Tensor]) -> Mask:
    """Random elements of the task vectors, large ones rather, summed."""
    weights, levels = WEIGHTS[:models], (2**30,) * models
    steps = (2**23,) * models
    key = MaskKey(7, name)
    ranks_M = tuple(ranks)
    thresholds = (0.0,) * models
    return Mask(weights, weights, thresholds, levels, key, rank_steps=steps, ranks=ranks_M)


Tables = Callable[[int, int, str, list[torch.Tensor]], KernelTable]


@dataclass(frozen=True)
class Case:
    """What is timed: a method with M sources and a base, for K candidates over one read.

    Attributes:
        tables: From M, the candidate, the tensor's name and its ranks to what to do.
        models: M.
        candidates: K.
        goal: Fraction of the copy's bandwidth that is wanted.
    """

    tables: Tables
    models: int
    candidates: int
    goal: float

    @property
    def bytes_each(self) -> int:
        """Bytes of one parameter that are read and written."""
        ranks = self.models if self.tables is della else 0
        return 2 * (self.models + 1 + self.candidates) + ranks


CASES = (
    Case(span, 3, 1, 0.92),
    Case(span, 3, 8, 0.87),
    Case(span, 8, 1, 0.92),
    Case(ties, 3, 1, 0.85),
    Case(ties, 8, 1, 0.78),
    Case(dare, 3, 1, 0.85),
    Case(dare, 3, 8, 0.80),
    Case(dare, 8, 1, 0.80),
    Case(della, 3, 1, 0.80),
)


@dataclass(frozen=True)
class Row:
    """What one case took.

    Attributes:
        case: Method.
        n: Sources, beside the base.
        k: Candidates over one read.
        params: Parameters of the arena.
        ms: The launch, per candidate and 7B model.
        fraction: Of the bandwidth of the copy.
        goal: What was wanted of it.
        whole_ms: Tables, launch and checksums with Python, per candidate and 7B model.
    """

    case: str
    n: int
    k: int
    params: int
    ms: float
    fraction: float
    goal: float
    whole_ms: float


def shapes(params: int) -> Iterator[int]:
    """Yield the sizes of the tensors of a model of about so many parameters."""
    layer, ends = (sum(map(_size, part)) for part in (LAYER, ENDS))
    for _ in range(max(1, round((params - ends) / layer))):
        yield from map(_size, LAYER)
    if params > ends:
        yield from map(_size, ENDS)


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def jobs_of(case: Case, sizes: list[int], device: torch.device) -> list[KernelJob]:
    """Build arenas and return the jobs of a whole model for every candidate."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // ALIGNED) * ALIGNED
    base = _normal(torch.empty(total, dtype=torch.bfloat16, device=device), 0.02, None, 0)
    arenas = [
        _normal(torch.empty_like(base), 0.001, base, seed) for seed in range(1, case.models + 1)
    ]
    live = [torch.empty_like(base) for _ in range(case.candidates)]
    with_ranks = case.models if case.tables is della else 0
    ranks = [(arena.view(torch.uint8)[:total] % 255) for arena in arenas[:with_ranks]]
    jobs = []
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        part = slice(start, start + size)
        rank_MP = [rank[part] for rank in ranks]
        for k in range(case.candidates):
            table = case.tables(case.models, k, f"tensor.{i}", rank_MP)
            jobs.append(KernelJob(table, base[part], [x[part] for x in arenas], live[k][part]))
    return jobs


def _normal(
    arena_P: torch.Tensor, spread: float, base_P: torch.Tensor | None, seed: int
) -> torch.Tensor:
    """Fill an arena with the base, or zeros, and normal steps; in pieces that fit anywhere."""
    generator = torch.Generator(arena_P.device).manual_seed(seed)
    for start in range(0, len(arena_P), 2**28):
        piece = arena_P[start : start + 2**28]
        piece.normal_(0.0, spread, generator=generator)
        if base_P is not None:
            piece += base_P[start : start + 2**28]
    return arena_P


def differing(case: Case, device: torch.device) -> int:
    """Return how many elements, checksums and flags differ from the reference on the CPU."""
    sizes = [CHECKED, 4096, 1, 2059, CHECKED // 4 + 5]
    jobs = jobs_of(case, sizes, device)
    written = triton_launch.carry_out_all(jobs)
    number = 0
    for job, told in zip(jobs, written, strict=True):
        wanted = torch.empty(len(job.out_P), dtype=job.out_P.dtype)
        sources = [source.cpu() for source in job.source_MP]
        assert job.base_P is not None, "every case has a base"
        reference.carry_out(_on_cpu(job.table), job.base_P.cpu(), sources, wanted)
        bits = job.out_P.cpu().view(torch.int16) != wanted.view(torch.int16)
        number += (
            int(bits.sum()) + (told.checksum != tensor_checksum(wanted)) + (not told.is_finite)
        )
    return number


def _on_cpu(table: KernelTable) -> KernelTable:
    if isinstance(table, Mask) and table.ranks:
        ranks = tuple(rank.cpu() for rank in table.ranks if rank is not None)
        return Mask(**(table.__dict__ | {"ranks": ranks}))
    return table


def timed(case: Case, params: int, rounds: int, device: torch.device) -> Row:
    """Time a case beside the copy."""
    fits = 0.85 * torch.cuda.mem_get_info(device)[0] - COPY_BYTES
    sizes = list(shapes(min(params, int(fits / case.bytes_each))))
    jobs = jobs_of(case, sizes, device)
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    triton_launch.carry_out_all(jobs)
    launches, fractions, wholes = [], [], []
    for _ in range(rounds):
        copied = _milliseconds(lambda: target.copy_(source))
        merged = _milliseconds(lambda: triton_launch.merge(jobs, device))
        launches.append(merged)
        moved = sum(sizes) * case.bytes_each
        fractions.append(moved / merged / (COPY_BYTES / copied))
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        triton_launch.carry_out_all(jobs)
        wholes.append(1e3 * (time.perf_counter() - begin))
    scale = MODEL / sum(sizes) / case.candidates
    return Row(
        case=case.tables.__name__,
        n=case.models,
        k=case.candidates,
        params=sum(sizes),
        ms=round(scale * statistics.median(launches), 2),
        fraction=round(statistics.median(fractions), 3),
        goal=case.goal,
        whole_ms=round(scale * statistics.median(wholes), 2),
    )


def _milliseconds(run: Callable[[], object]) -> float:
    """Return how long a device is busy with what is queued, without Python's share."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the device waits while the host prepares, so that it does not wait in between
    torch.cuda._sleep(200_000_000)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _where() -> dict[str, str]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    """Check and time every case; print a table, or with --json an object per line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=MODEL, help="parameters of the arenas")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if lacking := triton_launch.missing():
        print(f"benchmarks.gpu needs a CUDA device and triton: {lacking}.", file=sys.stderr)
        return 1
    device, where, failed = torch.device("cuda", torch.cuda.current_device()), _where(), False
    print("#", *where.values(), file=sys.stderr)
    for case in CASES:
        number = differing(case, device)
        failed |= number > 0
        torch.cuda.empty_cache()
        row = timed(case, options.params, options.rounds, device)
        torch.cuda.empty_cache()
        if options.json:
            print(json.dumps(asdict(row) | {"differing": number} | where), flush=True)
        else:
            print(
                f"{row.case:5} N={row.n} K={row.k}  {row.ms:7.2f} ms  {row.fraction:.3f} of copy "
                f"(goal {row.goal})  {row.whole_ms:7.2f} ms in all  {number} differ",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
