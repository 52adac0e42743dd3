"""What it costs to make a candidate's weights, beside a copy of the bytes and beside mergekit.

    python -m benchmarks.materialise --method ties -n 3 -k 1 --params 64Mi [--mergekit PYTHON]

Sources from a seed: base ~ N(0, 0.02), models base + N(0, 0.001), bfloat16, in tensors of 4096 rows
with at most 4096 columns. One thread, CPU time of the process, in rounds in which everything runs
in turn. What is timed is a candidate: its tables from its values, and their launch, which also
checks the result and takes its checksums. The copy moves what must be moved: every source, and the
base where there is one, read once, and each result written once. Cases:

- `thresholds cached`, `norms cached`, `statistics cached`: the same values in every round;
- `new density` (`new values` without one): other values in every round, as a search has them; what
  it knows of the tensors is kept;
- `statistics included` (`--cold-stats`): nothing is known before.

`x k1` is the time per candidate of K candidates in one launch over that of one alone. With the
Python of an environment with mergekit, that merges one tensor of the same kind, of
`--mergekit-params` elements, with the same values; compared are times per parameter.
"""

import argparse
import dataclasses
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import (
    Row,
    Run,
    copy_of,
    count,
    interleaved,
    one_thread,
    parser,
    show,
    size,
)
from benchmarks.mergekit_tensors import Mergekit
from evomerge.config.params import Param
from evomerge.kernels import dispatch
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.statistics import StatisticsCache, TensorStatistics
from evomerge.methods import METHODS
from evomerge.methods.method import Method, Values

ROWS = COLUMNS = 4096
"""Shape of the largest tensor."""

SEED = 0
"""Of the parameters that are drawn, and of the tensors."""

NOT_SEARCHED = ("arcee_fusion", "fourier", "tsv", "iso_c", "passthrough")
"""What `all` leaves out: no parameter to search, or arithmetic on whole matrices."""

MOST_MERGEKIT_ROUNDS = 3
"""mergekit's sorts take half a second per million parameters; so few rounds settle the ratio."""


@dataclass(frozen=True)
class World:
    """The tensors of a base and of models; each model a list of flat tensors.

    Attributes:
        base: The base's.
        models: One list per model.
        shapes: Of the tensors.
    """

    base: Sequence[torch.Tensor]
    models: Sequence[Sequence[torch.Tensor]]
    shapes: Sequence[tuple[int, ...]]

    @property
    def num_params(self) -> int:
        """Elements of one model."""
        return sum(len(tensor) for tensor in self.base)


class Candidates:
    """K candidates over one set of sources, made again and again.

    Args:
        method: How they are merged.
        world: The sources; as many models as the method takes.
        num_candidates: K.
        changing: Whether every call draws new values.
        cold: Whether every call starts without statistics.
    """

    def __init__(
        self,
        method: Method,
        world: World,
        num_candidates: int,
        changing: bool = False,
        cold: bool = False,
    ) -> None:
        self.implementations: tuple[str, ...] = ()
        self._method, self._world = method, world
        self._changing, self._cold = changing, cold
        self._cache = StatisticsCache()
        self._draw = random.Random(SEED)
        self.values = self._drawn(num_candidates)
        self.outs = [[torch.zeros_like(t) for t in world.base] for _ in range(num_candidates)]

    def _drawn(self, num_candidates: int) -> list[Values]:
        num_models = len(self._world.models)
        return [drawn_values(self._method, num_models, self._draw) for _ in range(num_candidates)]

    def make(self) -> None:
        """Make all candidates in one launch."""
        if self._cold:
            self._cache = StatisticsCache()
        if self._changing:
            self.values = self._drawn(len(self.outs))
        pairs = zip(self.values, self.outs, strict=True)
        jobs = [job for values, outs in pairs for job in self._jobs(values, outs)]
        written, self.implementations = dispatch.carry_out_all(jobs)
        assert all(each.is_finite for each in written), "a merge of finite tensors is not finite"

    def _jobs(self, values: Values, outs: Sequence[torch.Tensor]) -> Iterator[KernelJob]:
        for i, out_P in enumerate(outs):
            facts = statistics_of(self._method, self._world, i, self._cache)
            table = self._method.table(values, facts)
            yield KernelJob(table, facts.base_P, facts.source_MP, out_P)

    def num_bytes(self) -> int:
        """Return the bytes that must be moved: sources read once, results written."""
        read = len(self._world.models) + self._method.needs_base
        tensors = (read + len(self.outs)) * list(self._world.base)
        return sum(tensor.nbytes for tensor in tensors)


def statistics_of(
    method: Method, world: World, number: int, cache: StatisticsCache
) -> TensorStatistics:
    """Return the statistics of one tensor of the world, as a method wants them."""
    return TensorStatistics(
        name=f"model.layers.{number}.weight",
        base_P=world.base[number] if method.needs_base else None,
        source_MP=[model[number] for model in world.models],
        base="base" if method.needs_base else None,
        models=tuple(f"model {i}" for i in range(len(world.models))),
        cache=cache,
        shape=world.shapes[number],
    )


def make_world(num_params: int, num_models: int, dtype: torch.dtype = torch.bfloat16) -> World:
    """Make a base and models from `SEED`; as many whole rows of 4096 as are in `num_params`."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = list(shapes_of(num_params))
    base: list[torch.Tensor] = []
    models: list[list[torch.Tensor]] = [[] for _ in range(num_models)]
    for rows, columns in shapes:
        exact_P = torch.randn(rows * columns, generator=generator) * 0.02
        base.append(exact_P.to(dtype))
        for model in models:
            noise_P = torch.randn(rows * columns, generator=generator)
            model.append(noise_P.mul_(0.001).add_(exact_P).to(dtype))
    return World(base, models, shapes)


def shapes_of(num_params: int) -> Iterator[tuple[int, int]]:
    """Yield shapes with so many elements in all, but for a remainder of less than a row."""
    rows = min(ROWS, num_params)
    columns = num_params // rows
    while columns > 0:
        yield rows, min(columns, COLUMNS)
        columns -= COLUMNS


def drawn_values(method: Method, num_models: int, draw: random.Random) -> Values:
    """Draw parameters from the ranges that are searched; those without one keep their default."""
    while True:
        values = Values(
            {p.name: _each(p, num_models, draw) for p in method.params if p.per_model},
            {p.name: _drawn(p, draw) for p in method.params if not p.per_model},
        )
        if method.refuse(values) is None:
            return values


def _each(param: Param, num_models: int, draw: random.Random) -> tuple[float, ...]:
    return tuple(_drawn(param, draw) for _ in range(num_models))


def _drawn(param: Param, draw: random.Random) -> float | bool:
    if param.search is None:
        assert param.default is not None, f"{param.name} has neither a range nor a default"
        return param.default
    low, high = param.search
    return draw.randint(int(low), int(high)) if param.kind == "int" else draw.uniform(low, high)


@dataclass(frozen=True)
class Theirs:
    """mergekit's side of the table; without an environment there is none.

    Attributes:
        mergekit: Its process.
        rounds: How often each merge is timed.
    """

    mergekit: Mergekit
    rounds: int

    def ns(self, method: Method, num_models: int, values: Values) -> float | None:
        """Return nanoseconds per parameter, the median of the rounds; None without the method."""
        seconds = self.mergekit.seconds(
            method.name,
            num_models,
            method.needs_base,
            values.per_model,
            values.shared,
            self.rounds,
        )
        return None if seconds is None else 1e9 * median(seconds) / self.mergekit.num_params


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = parse(words)
    one_thread()
    with ExitStack() as stack:
        theirs = _their_side(arguments, stack)
        show(rows(arguments, theirs), arguments.json)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    made = parser(__doc__)
    made.add_argument("--method", required=True, choices=("all", *METHODS))
    made.add_argument("-n", type=count, default=3, help="models, fewer where a method takes fewer")
    made.add_argument("-k", type=count, default=1, help="candidates in one launch")
    made.add_argument("--params", type=size, default=size("64Mi"), help="such as 64Mi")
    made.add_argument("--cold-stats", action="store_true", help="time statistics too")
    made.add_argument("--mergekit", type=Path, help="Python of an environment with mergekit")
    made.add_argument("--mergekit-params", type=size, default=size("16Mi"), help="such as 4Mi")
    return made.parse_args(words)


def _their_side(arguments: argparse.Namespace, stack: ExitStack) -> Theirs | None:
    if arguments.mergekit is None:
        return None
    world = make_world(min(arguments.mergekit_params, ROWS * COLUMNS), arguments.n)
    (shape,) = world.shapes
    tensors = {"base": world.base[0].reshape(shape)}
    tensors |= {str(i): model[0].reshape(shape) for i, model in enumerate(world.models)}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    mergekit = stack.enter_context(Mergekit(arguments.mergekit.absolute(), tensors, folder))
    return Theirs(mergekit, min(arguments.rounds, MOST_MERGEKIT_ROUNDS))


def rows(arguments: argparse.Namespace, theirs: Theirs | None) -> Iterator[Row]:
    """Yield the rows of the table, method by method."""
    every = [name for name in METHODS if name not in NOT_SEARCHED]
    world = make_world(arguments.params, arguments.n)
    for name in every if arguments.method == "all" else [arguments.method]:
        method = METHODS[name]
        num_models = min(arguments.n, method.max_parents or arguments.n)
        part = dataclasses.replace(world, models=world.models[:num_models])
        yield from rows_of(method, part, arguments, theirs)


def rows_of(
    method: Method, world: World, arguments: argparse.Namespace, theirs: Theirs | None
) -> Iterator[Row]:
    """Yield a method's rows: with statistics kept, with other values, without statistics."""
    num_models = len(world.models)
    values = drawn_values(method, num_models, random.Random(SEED))
    their_ns = theirs and theirs.ns(method, num_models, values)
    for case, options in cases(method, arguments.cold_stats):
        candidates = Candidates(method, world, arguments.k, **options)
        runs: dict[str, Run] = {"ours": candidates.make, "copy": copy_of(candidates.num_bytes())}
        if arguments.k > 1:
            runs["alone"] = Candidates(method, world, 1, **options).make
        rounds = interleaved(runs, arguments.rounds)
        ns = 1e9 * rounds.median_s("ours") / world.num_params / arguments.k
        more = {
            "implementation": "+".join(candidates.implementations),
            "ns_per_param": ns,
            "params": world.num_params,
            "x_k1": rounds.ratio("ours", "alone", arguments.k).median if "alone" in runs else None,
            "mergekit_ns_per_param": their_ns,
            "mergekit_params": theirs and theirs.mergekit.num_params,
        }
        x_copy, x_mergekit = rounds.ratio("ours", "copy"), their_ns and their_ns / ns
        yield Row(case, method.name, num_models, arguments.k, x_copy, x_mergekit, more=more)


def cases(method: Method, cold_stats: bool) -> Iterator[tuple[str, dict[str, bool]]]:
    """Yield the name of each case, and how `Candidates` does it."""
    has_density = any(param.name == "density" for param in method.params)
    kept = "statistics"
    if has_density:
        kept = "norms" if method.random_masks else "thresholds"
    yield f"{kept} cached", {}
    if any(param.search for param in method.params):
        yield f"new {'density' if has_density else 'values'}", {"changing": True}
    if cold_stats:
        yield "statistics included", {"cold": True}


if __name__ == "__main__":
    main()
