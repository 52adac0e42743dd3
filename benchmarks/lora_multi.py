"""What K candidates of N adapters cost in one forward pass, beside the base product alone.

    python -m benchmarks.lora_multi [-k 8] [-n 8] [-r 16] [--size 2048] [--rounds 9] [--json]

One square linear module; each candidate has its own coefficients and its own tokens. `x base` is
`adapters.together` over the plain module on the same tokens. `materialised x base` is the same for
one candidate after another: its weights, by one product of the stacked factors, then the module on
its tokens. `operations x base` is what counting multiplications lets expect of the former. 128
tokens per candidate stand for scoring prompts, 1 for generation, where a pass mostly reads weights.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import Row, Run, count, interleaved, one_thread, parser, show
from evomerge.adapters.adapter import Adapter, LowRank
from evomerge.adapters.together import wrap

DTYPES = (torch.float32, torch.bfloat16)

TOKENS = (128, 1)
"""Tokens per candidate."""

TOKENS_TIMED = 128
"""What is fast is repeated until it has computed this many tokens per candidate."""

NAME = "m.weight"


def main() -> None:
    """Parse, measure, print."""
    made = parser(__doc__)
    made.add_argument("-k", type=count, default=8, help="candidates, default 8")
    made.add_argument("-n", type=count, default=8, help="adapters, default 8")
    made.add_argument("-r", type=count, default=16, help="rank of each adapter, default 16")
    made.add_argument("--size", type=count, default=2048, help="inputs and outputs, default 2048")
    given = made.parse_args()
    one_thread()
    with torch.inference_mode():
        show(rows(given), given.json)


def rows(given: argparse.Namespace) -> Iterator[Row]:
    """Measure every dtype and number of tokens."""
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        weight_OI = 0.02 * torch.randn(given.size, given.size, generator=generator)
        parts = [low_rank(given.r, given.size, generator) for _ in range(given.n)]
        coefficients_KN = torch.rand(given.k, given.n, generator=generator)
        for tokens in TOKENS:
            x_KTI = torch.randn(given.k, tokens, given.size, generator=generator)
            yield measured(
                weight_OI.to(dtype), parts, coefficients_KN, x_KTI.to(dtype), given.rounds
            )


def low_rank(rank: int, size: int, generator: torch.Generator) -> LowRank:
    """Return an adapter's part; eight of rank 16 add as much as the weights have."""
    a_RI = 0.1 * torch.randn(rank, size, generator=generator)
    b_OR = 0.02 * torch.randn(size, rank, generator=generator)
    return LowRank("m", a_RI, b_OR, 2.0)


def measured(
    weight_OI: torch.Tensor,
    parts: list[LowRank],
    coefficients_KN: torch.Tensor,
    x_KTI: torch.Tensor,
    rounds: int,
) -> Row:
    """Return a row: together and materialised, each over the base product."""
    plain, wrapped = model_of(weight_OI), model_of(weight_OI)
    num_candidates, tokens, size = x_KTI.shape
    adapters = [Adapter("random", {NAME: part}, {}, {}, ties_head=False) for part in parts]
    with wrap(wrapped, adapters) as together:
        together.set_candidates([{NAME: row} for row in coefficients_KN.tolist()])
        together.assign_rows(range(num_candidates))
        base, ours = partial(plain["m"], x_KTI), partial(wrapped["m"], x_KTI)
        alone = materialiser(weight_OI, parts, coefficients_KN, x_KTI)
        check(base(), ours(), alone())
        repeats = max(1, TOKENS_TIMED // tokens)
        runs: dict[str, Run] = {
            "base": partial(repeat, base, repeats),
            "together": partial(repeat, ours, repeats),
            "materialised": alone,  # once: it takes long enough
        }
        times = interleaved(runs, rounds)
    ratio = times.ratio("together", "base")
    return Row(
        case=f"{str(x_KTI.dtype).removeprefix('torch.')}, {tokens} tokens per candidate",
        method="task_arithmetic",
        n=len(parts),
        k=num_candidates,
        more={
            "x_base": ratio.median,
            "x_base_spread": [round(ratio.low, 3), round(ratio.high, 3)],
            "materialised_x_base": times.ratio("materialised", "base", 1 / repeats).median,
            "operations_x_base": 1 + 2 * sum(part.rank for part in parts) / size,
        },
    )


def model_of(weight_OI: torch.Tensor) -> torch.nn.ModuleDict:
    """Return a model of one linear module, `m`, that uses this memory."""
    outputs, inputs = weight_OI.shape
    module = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    return torch.nn.ModuleDict({"m": module})


def materialiser(
    weight_OI: torch.Tensor,
    parts: list[LowRank],
    coefficients_KN: torch.Tensor,
    x_KTI: torch.Tensor,
) -> Callable[[], torch.Tensor]:
    """Return a run that makes one candidate's weights after another and computes its tokens."""
    a_SI = torch.cat([part.a_RI for part in parts]).to(weight_OI)
    b_OS = torch.cat([part.scale * part.b_OR for part in parts], 1).to(weight_OI)
    ranks = torch.tensor([part.rank for part in parts])
    lam_KS = coefficients_KN.repeat_interleave(ranks, 1).to(weight_OI)
    return partial(one_by_one, weight_OI, a_SI, b_OS, lam_KS, x_KTI)


def one_by_one(
    weight_OI: torch.Tensor,
    a_SI: torch.Tensor,
    b_OS: torch.Tensor,
    lam_KS: torch.Tensor,
    x_KTI: torch.Tensor,
) -> torch.Tensor:
    """Return each candidate's outputs, from weights of its own."""
    outs = []
    for lam_S, x_TI in zip(lam_KS, x_KTI, strict=True):
        merged_OI = torch.addmm(weight_OI, b_OS * lam_S, a_SI)
        outs.append(torch.nn.functional.linear(x_TI, merged_OI))
    return torch.stack(outs)


def check(base: torch.Tensor, together: torch.Tensor, alone: torch.Tensor) -> None:
    """Stop where the two ways differ by more than rounding, or leave out the adapters."""
    # both sum up in float32, over some thousand terms, and round a few times to their dtype
    eps = 64 * torch.finfo(torch.float32).eps + 4 * torch.finfo(base.dtype).eps
    rounding = eps * rms(base)
    assert rms(together - alone) < rounding
    assert rms(together - base) > 2 * rounding


def rms(tensor: torch.Tensor) -> float:
    """Return the root of the mean square."""
    return float(tensor.double().square().mean().sqrt())


def repeat(run: Run, times: int) -> None:
    """Run a number of times."""
    for _ in range(times):
        run()


if __name__ == "__main__":
    main()
