"""Whether every implementation of the kernels gives the reference's bits, for every merge method.

    python -m benchmarks.equality

Tables of every method, with values drawn from what is searched and switches set at random, on
tensors of odd sizes, in three dtypes, of one to nine models, rounded to nearest and at random, in
one launch per method. Every implementation that this machine has is compared with the reference:
the bits of the results, their checksums, and whether they are finite. Triton runs on a GPU where
there is one; else, where it is installed, in its interpreter, in a process of its own and on small
tensors. What only the reference can do is said to be so. Exit code 1 if anything differs.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from benchmarks.materialise import drawn_values
from benchmarks.measure import Row, one_thread, parser, show
from evomerge.kernels import triton_launch
from evomerge.kernels.dispatch import KERNELS, REFERENCE, Kernels
from evomerge.kernels.launch import KernelJob, Written
from evomerge.kernels.masks import MaskKey
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics, ThresholdTies
from evomerge.kernels.tables import KernelTable, Mask, Whole
from evomerge.kernels.triton_pack import can_pack
from evomerge.methods import METHODS
from evomerge.methods.method import Method, Values

SHAPES = ((1,), (7,), (61, 33), (3, 5, 7), (4099,), (97, 401))
"""Of the tensors; the last is longer than a chunk of the reference."""

SMALL_SHAPES = ((7,), (61, 33))
"""For Triton's interpreter, which takes seconds for a million elements."""

NUM_MODELS = (1, 2, 3, 5, 9)
"""How many are merged, where a method takes so many."""

SMALL_NUM_MODELS = (1, 3, 5)
NUM_RECIPES = (1, 2, 5)
"""How many recipes there are over the same sources; chosen at random."""

B, H, F = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((B, B, B), (H, H, H), (F, F, F), (B, F, F), (F, B, B))
"""Of base, models and result."""

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]

CUT = 8 * 1237
"""Where a tensor that is long enough is cut into two runs; a multiple of 8, as jobs want."""

NAME = "model.layers.0.mlp.up_proj.weight"
DITHER = MaskKey(3, NAME)
INTERPRETED = {"TRITON_INTERPRET": "1"}
"""What makes Triton interpret its kernels; it is read when triton is imported."""


@dataclass(frozen=True)
class Found:
    """What an implementation made of a method's jobs, beside the reference.

    Attributes:
        jobs: How many it ran.
        left: How many it cannot run, which leaves them to the reference.
        elements: How many were compared.
        differing: Those whose bits differ.
        told: Jobs of which it tells another checksum, or another finiteness.
    """

    jobs: int
    left: int
    elements: int
    differing: int
    told: int


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    made = parser(__doc__)
    made.add_argument("--method", choices=tuple(METHODS), help="only this one; else every one")
    made.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    arguments = made.parse_args(words)
    one_thread()
    found = list(rows(arguments))
    show(found, arguments.json)
    differing = sum(int(row.more["differing"]) + int(row.more["told"]) for row in found)
    return 1 if differing else 0


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every method and implementation."""
    for name in [arguments.method] if arguments.method else list(METHODS):
        yield from rows_of(METHODS[name], arguments.interpreted)
    if not arguments.interpreted and needs_interpreter():
        yield from interpreted_rows(arguments.method)


def rows_of(method: Method, interpreted: bool) -> Iterator[Row]:
    """Yield a method's rows, of this process; one that says so where there is nothing to compare.

    Args:
        method: The merge method.
        interpreted: Compare Triton's interpreter, on small tensors; else all that is here.
    """
    sizes = (SMALL_SHAPES, SMALL_NUM_MODELS) if interpreted else (SHAPES, NUM_MODELS)
    jobs = list(jobs_of(method, *sizes))
    expected = [empty_copy(job) for job in jobs]
    written = REFERENCE.carry_out_all(expected)
    models = max(len(job.source_MP) for job in jobs)
    compared = False
    for kernels in [interpreter()] if interpreted else implementations():
        for device in devices():
            found = compare(kernels, jobs, expected, written, device)
            if found.jobs:
                compared = True
                name = f"{kernels.name} on {device}"
                yield row_of(f"{name} == reference", method, models, kernels.name, found)
    if not compared and not interpreted:
        nothing = Found(0, len(jobs), 0, 0, 0)
        yield row_of("reference only", method, models, REFERENCE.name, nothing)


def row_of(case: str, method: Method, models: int, name: str, found: Found) -> Row:
    """Return a row of the table."""
    more = {"implementation": name, **dataclasses.asdict(found)}
    return Row(case, method.name, models, max(NUM_RECIPES), more=more)


def implementations() -> list[Kernels]:
    """Return the implementations that this machine has, but for the reference."""
    return [each for each in KERNELS if each is not REFERENCE and each.missing() is None]


def interpreter() -> Kernels:
    """Return Triton's kernels on the CPU; only in a process with `INTERPRETED`."""
    return Kernels("triton's interpreter", lambda: None, can_pack, triton_launch.carry_out_all)


def needs_interpreter() -> bool:
    """Whether triton is installed, and there is no GPU to run it on."""
    return importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()


def devices() -> list[str]:
    """Return where jobs may lie."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def interpreted_rows(method: str | None) -> Iterator[Row]:
    """Yield the rows of Triton's interpreter, from a process that has it.

    Args:
        method: Only this one; None is all.
    """
    command = [sys.executable, "-m", "benchmarks.equality", "--json", "--interpreted"]
    command += ["--method", method] if method else []
    run = subprocess.run(command, env={**os.environ, **INTERPRETED}, stdout=subprocess.PIPE)
    assert run.returncode in (0, 1), "the process with the interpreter failed; see above"
    for line in run.stdout.splitlines():
        yield as_row(json.loads(line))


def as_row(data: Mapping[str, object]) -> Row:
    """Return the row that was printed with `--json`."""
    row = Row(str(data["case"]), str(data["method"]), int(str(data["n"])), int(str(data["k"])))
    known = row.as_dict()
    return dataclasses.replace(row, more={k: v for k, v in data.items() if k not in known})


def compare(
    kernels: Kernels,
    jobs: Sequence[KernelJob],
    expected: Sequence[KernelJob],
    written: Sequence[Written],
    device: str,
) -> Found:
    """Run the jobs that an implementation can run, in one launch, and count what differs.

    Args:
        kernels: The implementation.
        jobs: The jobs; not written to.
        expected: The same, carried out by the reference.
        written: What that told.
        device: Where the tensors are to lie.
    """
    moved = [on_device(empty_copy(job), device) for job in jobs]
    places = [i for i, job in enumerate(moved) if kernels.can_run(job)]
    told = kernels.carry_out_all([moved[i] for i in places]) if places else []
    return Found(
        jobs=len(places),
        left=len(jobs) - len(places),
        elements=sum(len(jobs[i].out_P) for i in places),
        differing=sum(num_differing(moved[i].out_P.cpu(), expected[i].out_P) for i in places),
        told=sum(ours != written[i] for i, ours in zip(places, told, strict=True)),
    )


def num_differing(ours_P: torch.Tensor, theirs_P: torch.Tensor) -> int:
    """Return how many elements of two tensors of one dtype have other bits."""
    bits = torch.int32 if ours_P.itemsize == 4 else torch.int16
    return int((ours_P.view(bits) != theirs_P.view(bits)).sum())


def empty_copy(job: KernelJob) -> KernelJob:
    """Return a job with a result of its own, NaN so that what is not written shows."""
    return dataclasses.replace(job, out_P=torch.full_like(job.out_P, math.nan))


def on_device(job: KernelJob, device: str) -> KernelJob:
    """Return a job whose tensors lie on a device."""
    table: KernelTable = job.table
    if isinstance(table, Mask):
        ranks = tuple(rank_P if rank_P is None else rank_P.to(device) for rank_P in table.ranks)
        table = dataclasses.replace(table, ranks=ranks)
    return dataclasses.replace(
        job,
        table=table,
        base_P=None if job.base_P is None else job.base_P.to(device),
        source_MP=[source_P.to(device) for source_P in job.source_MP],
        out_P=job.out_P.to(device),
    )


def jobs_of(
    method: Method, shapes: Sequence[tuple[int, ...]], num_models: Sequence[int]
) -> Iterator[KernelJob]:
    """Yield jobs of a method: every shape, dtype and number of models, with values of their own."""
    draw = random.Random(0)
    highest = method.max_parents or max(num_models)
    for number in sorted({max(method.min_parents, min(n, highest)) for n in num_models}):
        for kind in DTYPES:
            for shape in shapes:
                yield from jobs_over(method, number, kind, shape, draw)


def jobs_over(
    method: Method, number: int, kind: Dtypes, shape: tuple[int, ...], draw: random.Random
) -> Iterator[KernelJob]:
    """Yield the jobs of several recipes over one tensor of a base and a number of models."""
    base_P, source_MP = make_tensors(number, math.prod(shape), kind, draw.randrange(2**31))
    base = base_P if method.needs_base else None
    base_name, names = "base" if method.needs_base else None, tuple(map(str, range(number)))
    cache, mask_seed = StatisticsCache(), draw.randrange(2**32)
    for _ in range(draw.choice(NUM_RECIPES)):
        facts = TensorStatistics(NAME, base, source_MP, base_name, names, mask_seed, cache, shape)
        facts = dataclasses.replace(facts, threshold_ties=draw.choice(get_args(ThresholdTies)))
        table = method.table(unusual_values(method, number, draw), facts)
        out_P = torch.empty_like(base_P, dtype=kind[2])
        dither = DITHER if kind[2] is B and draw.random() < 0.5 else None
        job = KernelJob(table, base, source_MP, out_P, dither)
        yield from [job] if isinstance(table, Whole) else runs_of(job)


def runs_of(job: KernelJob) -> Iterator[KernelJob]:
    """Yield a job, or two for a long tensor: up to `CUT`, and from there on."""
    size = len(job.out_P)
    for start, stop in ((0, min(CUT, size)), (CUT, size)):
        if start < stop:
            yield dataclasses.replace(
                job,
                base_P=None if job.base_P is None else job.base_P[start:stop],
                source_MP=[source_P[start:stop] for source_P in job.source_MP],
                out_P=job.out_P[start:stop],
                first=start,
            )


def make_tensors(
    number: int, size: int, kind: Dtypes, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models near it, with equal elements, zeros of both signs and tiny ones."""
    generator = torch.Generator().manual_seed(seed)
    base_P = torch.randn(size, generator=generator) * 0.02
    base_P[5::13] = 0.0
    source_MP = [base_P + torch.randn(size, generator=generator) * 0.001 for _ in range(number)]
    for source_P in source_MP:
        source_P[3::7] = base_P[3::7]
        source_P[5::26] = -0.0
        source_P[6::26] = 1e-39
    return base_P.to(kind[0]), [source_P.to(kind[1]) for source_P in source_MP]


def unusual_values(method: Method, number: int, draw: random.Random) -> Values:
    """Draw values, some of them negative or at the end of their range, and switches at random."""
    while True:
        values = drawn_values(method, number, draw)
        own = {
            name: tuple(unusual(name, number, draw) for number in each)
            for name, each in values.per_model.items()
        }
        switches = {p.name: draw.random() < 0.5 for p in method.params if p.kind == "bool"}
        values = Values(own, {**values.shared, **switches})
        if method.refuse(values) is None:
            return values


def unusual(name: str, value: float, draw: random.Random) -> float:
    """Return a value, or now and then one that searches seldom come to."""
    if name == "weight" and draw.random() < 0.25:
        return -value
    if name == "density" and draw.random() < 0.25:
        return float(draw.random() < 0.5)
    return value


if __name__ == "__main__":
    sys.exit(main())
