"""Facts that a search computes once, and norms that it computes for every new density.

    python -m benchmarks.stats [--params 16Mi] [--json]

Each is timed by itself, computed anew: a base and three parents in bfloat16, noise from seeds.
`x_copy` divides by a copy that moves as many bytes as must be read. The torch code that does the
same where there is no compiler is timed on a shorter tensor, because it takes up to a second for
each million elements.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

from benchmarks import measure
from evomerge.kernels import native_statistics
from evomerge.kernels.histograms import count_magnitudes, count_numbers
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.ranks import HIGHEST, delta_ranks
from evomerge.kernels.sums import gram, l1_norms, term_sums
from evomerge.kernels.tables import Fused, Mask
from evomerge.methods import ram, sce

NUM_MODELS = 3
COLUMNS = 4096
TORCH_PARAMS = 2**19

Models = tuple[torch.Tensor, list[torch.Tensor]]
"""Base and parents."""


@dataclass(frozen=True)
class Case:
    """A fact.

    Attributes:
        name: What is computed.
        method: A merge method that needs it.
        num_models: How many parents are read.
        extra_bytes: What else is read, per element.
        run: Computes it, of base and parents.
    """

    name: str
    method: str
    num_models: int
    run: Callable[[Models], object]
    extra_bytes: int = 0


def main() -> None:
    """Time every fact and print a row for each."""
    parser = measure.parser(__doc__)
    parser.add_argument("--params", type=measure.size, default=2**24, help="default 16Mi")
    arguments = parser.parse_args()
    measure.one_thread()
    params = -(-arguments.params // COLUMNS) * COLUMNS
    models, short = make_models(params), make_models(TORCH_PARAMS)
    rows = (row(case, models, short, arguments.rounds) for case in cases())
    measure.show(rows, arguments.json)


def make_models(params: int) -> Models:
    """Return a base and parents at small distances from it."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(params, generator=generator)
    noises = (torch.randn(params, generator=generator) for _ in range(NUM_MODELS))
    return base.bfloat16(), [(base + 1e-3 * noise).bfloat16() for noise in noises]


def cases() -> Iterator[Case]:
    """Yield what is timed."""
    yield Case("gram", "karcher", NUM_MODELS, lambda models: gram(*models))
    yield Case("histogram", "ties", 1, partial(count, dtype=torch.bfloat16, within=None))
    yield Case("histogram, upper bits", "ties", 1, partial(count, dtype=torch.float32, within=None))
    yield Case(
        "histogram, lower bits", "ties", 1, partial(count, dtype=torch.float32, within=0x3A80)
    )
    yield Case("norms before", "dare_linear", NUM_MODELS, partial(norms, mask=mask()))
    half = (KEEP_ALL // 2,) * NUM_MODELS
    yield Case(
        "norms after", "dare_linear", NUM_MODELS, partial(norms, mask=mask(keep_levels=half))
    )
    trimmed = mask(thresholds=(1e-3,) * NUM_MODELS)
    yield Case("norms after", "ties", NUM_MODELS, partial(norms, mask=trimmed))
    yield Case("norms after", "della", NUM_MODELS, norms_by_ranks, NUM_MODELS)
    yield Case("ranks", "della", 1, ranks)
    yield Case("energies", "sce", NUM_MODELS, energies)
    yield Case("spreads", "sce", NUM_MODELS, spreads)
    yield Case("shared and unique", "ramplus_tl", NUM_MODELS, shares)


def count(models: Models, dtype: torch.dtype, within: int | None) -> object:
    """Count the magnitudes of the first task vector."""
    base_P, source_MP = models
    return count_magnitudes(base_P, source_MP[0], dtype, within)


def mask(**fields: object) -> Mask:
    """Return a mask of which only what it keeps matters."""
    ones = (1.0,) * NUM_MODELS
    everything = {"thresholds": (0.0,) * NUM_MODELS, "keep_levels": (KEEP_ALL,) * NUM_MODELS}
    return Mask(ones, ones, key=MaskKey(0, "layer"), **{**everything, **fields})


def norms(models: Models, mask: Mask) -> object:
    """Return what a mask leaves of the norms."""
    return l1_norms(mask, *models, range(NUM_MODELS))


def norms_by_ranks(models: Models) -> object:
    """As `norms`, with chances that depend on ranks, which are all the same here."""
    rank_P = torch.full_like(models[0], HIGHEST // 2, dtype=torch.uint8)
    levels, steps = (KEEP_ALL // 4,) * NUM_MODELS, (KEEP_ALL // 2 // HIGHEST,) * NUM_MODELS
    chances = mask(keep_levels=levels, rank_steps=steps, ranks=(rank_P,) * NUM_MODELS)
    return norms(models, chances)


def ranks(models: Models) -> object:
    """Rank the first task vector's magnitudes."""
    base_P, source_MP = models
    shape = (len(base_P) // COLUMNS, COLUMNS)
    return delta_ranks(base_P, source_MP[0], torch.bfloat16, shape)


def energies(models: Models) -> object:
    """Sum the squares of what SCE keeps."""
    squares = partial(sce._squares, threshold=1e-6)
    return term_sums(*models, squares, Fused("sce squares", shared=(1e-6,)))


def spreads(models: Models) -> object:
    """Count the spreads that SCE chooses by."""
    return count_numbers(*models, "spread", sce.spread)


def shares(models: Models) -> object:
    """Count what the models share."""
    return term_sums(
        *models, partial(ram._shares, epsilon=1e-3), Fused("ram shares", shared=(1e-3,))
    )


def row(case: Case, models: Models, short: Models, rounds: int) -> measure.Row:
    """Time one fact beside a copy and beside torch."""
    params = len(models[0])
    num_bytes = params * (2 * (case.num_models + 1) + case.extra_bytes)
    timed = measure.interleaved(
        {
            "ours": partial(case.run, models),
            "copy": measure.copy_of(num_bytes),
            "torch": partial(by_torch, case.run, short),
        },
        rounds,
    )
    ours_ns = 1e9 * timed.median_s("ours") / params
    torch_ns = 1e9 * timed.median_s("torch") / len(short[0])
    more = {
        "ns_per_element": ours_ns,
        "ns_per_element_and_source": ours_ns / case.num_models,
        "torch_ns_per_element": torch_ns,
        "native": native_statistics.missing() is None,
    }
    ratio = timed.ratio("ours", "copy")
    return measure.Row(case.name, case.method, case.num_models, 1, ratio, more=more)


def by_torch(run: Callable[[Models], object], models: Models) -> object:
    """Run as where there is no compiler."""
    with mock.patch.object(native_statistics, "_library", return_value=None):
        return run(models)


if __name__ == "__main__":
    main()
