"""K candidates of one model's adapters in one forward pass, without their weights.

Where a merge is `base + sum_i c_i s_i B_i A_i` in every tensor, the candidates of a search share
all large products: with the factors of all adapters stacked, A = [A_1; ...; A_M] and
B = [B_1 ... B_M],

    y = x W^T + ((x A^T) * lam) B^T

and only `lam`, one number for each candidate and rank, differs between the rows of a batch. The
base product runs once for the tokens of all candidates; no candidate needs a copy of the model.

    with wrap(model, adapters) as together:
        together.set_candidates([coefficients_of(tables, adapters) for tables in tables_K])
        together.assign_rows(list(range(K)) * num_requests)
        logits = model(...)

No evaluator uses it yet. One would repeat each request K times, side by side, so that the rows of a
batch are padded to one length; assign the rows before each batch; and give each score to its row's
candidate. A candidate that is stopped early is left out of the next batch.

What is scored is the merge before it is rounded to its dtype. Rounded to bfloat16 its weights are a
slightly different model, whose digest is not known here: score the winner again from its weights.

Letters: M adapters, K candidates, S the sum of their ranks in a module, R rows and T positions of a
batch, I inputs and O outputs of a module.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from evomerge.adapters.adapter import Adapter, LowRank
from evomerge.errors import MergeError
from evomerge.kernels.tables import KernelTable, Span

Coefficients = Mapping[str, Sequence[float]]
"""One candidate: tensor name to a coefficient for each adapter, 0 where an adapter has no part."""

_SAME = 2.0**-24
"""A base scaled by a factor this near to 1 moves by no more than its rounding to float32."""
_ALONE = "Score such candidates one at a time, from their weights."


def why_not(tables: Mapping[str, KernelTable], adapters: Sequence[Adapter]) -> str | None:
    """Say why a recipe's candidates cannot be scored together; None where they can.

    Args:
        tables: What the recipe does with each tensor of a floating dtype, by the tensor's name. Its
            task vectors, where it makes some, start from the model that the adapters are for.
        adapters: One for each parent, in recipe order; empty for a parent that is the model itself.
    """
    return next(_problems(tables, adapters), None)


def coefficients_of(
    tables: Mapping[str, KernelTable], adapters: Sequence[Adapter]
) -> dict[str, tuple[float, ...]]:
    """Turn a recipe into the coefficients of its adapters, for `LoraTogether.set_candidates`.

    Args:
        tables: As for `why_not`.
        adapters: As for `why_not`.

    Returns:
        One coefficient per adapter for each tensor that an adapter adds to.

    Raises:
        MergeError: The recipe is not the model plus a weighted sum of these adapters.
    """
    problem = why_not(tables, adapters)
    if problem is not None:
        raise MergeError(problem)
    found = {name: tables[name] for name in _adapted(adapters)}
    return {name: table.coefficients for name, table in found.items() if isinstance(table, Span)}


def _problems(tables: Mapping[str, KernelTable], adapters: Sequence[Adapter]) -> Iterator[str]:
    yield from _not_low_rank(adapters)
    for name, table in sorted(tables.items()):
        if not isinstance(table, Span):
            yield f"{name}: its merge is no weighted sum, so it is not of low rank. {_ALONE}"
        elif len(table.coefficients) != len(adapters):
            yield (
                f"{name}: {len(table.coefficients)} models are merged, and {len(adapters)} "
                "adapters are given. Give one for each, an empty one for the model itself."
            )
        elif not abs((total := _share_of_base(table)) - 1.0) <= _SAME:
            yield (
                f"{name}: the merge scales the model itself, by {total:.9g}; only 1 is allowed. "
                "Let the weights add up to 1, or use task_arithmetic."
            )
    for name in _adapted(adapters):
        if name not in tables:
            yield f"{name}: an adapter adds to it, and the recipe does not merge it. {_ALONE}"


def _share_of_base(table: Span) -> float:
    return table.base if table.deltas else sum(table.coefficients)


def _not_low_rank(adapters: Sequence[Adapter]) -> Iterator[str]:
    for adapter in adapters:
        for name in sorted(adapter.saved):
            yield f"{adapter.label}: replaces {name} whole, which is not of low rank. {_ALONE}"
        for name, part in sorted(adapter.low_rank.items()):
            if part.embedding:
                yield (
                    f"{adapter.label}: adapts the embedding {name}; together, only adapters of "
                    f"linear modules can be scored. {_ALONE}"
                )


def _adapted(adapters: Sequence[Adapter]) -> list[str]:
    return sorted({name for adapter in adapters for name in adapter.low_rank})


def wrap(model: torch.nn.Module, adapters: Sequence[Adapter]) -> "LoraTogether":
    """Let every adapted module of a model add what the candidate of each row adds to it.

    The modules and their weights stay as and where they are; the addition is a forward hook. The
    stacked factors are held in the dtype and on the device of the module's weight.

    Args:
        model: A live model that computes its modules on (rows, positions, inputs), as decoders of
            transformers do; holds the weights of the model that the adapters are for.
        adapters: Any number, of any ranks, for the same modules or others.

    Raises:
        MergeError: An adapter does more than add to linear modules, or does not fit the model.
            Nothing was changed then.
    """
    for problem in _not_low_rank(adapters):
        raise MergeError(problem)
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    bound = {}
    for name in _adapted(adapters):
        parts = {i: a.low_rank[name] for i, a in enumerate(adapters) if name in a.low_rank}
        path = name.removesuffix(".weight")
        # files of a model without its head name modules without the leading one
        module = modules.get(path, modules.get(f"{prefix}.{path}"))
        for part in parts.values():
            _check_module(module, name, part)
        bound[name] = module, parts
    stacks = {name: _Stack(name, module, parts) for name, (module, parts) in bound.items()}
    return LoraTogether(stacks, len(adapters))


def _check_module(module: Any, name: str, part: LowRank) -> None:
    """Refuse a module that is not the linear one whose weight a part is for.

    Raises:
        MergeError: It is not, or it is None.
    """
    # Conv1D is GPT-2's linear module, which transformers defines; its weight is inputs first
    linear = isinstance(module, torch.nn.Linear)
    if module is None or not (linear or type(module).__name__ == "Conv1D"):
        raise MergeError(
            f"{name}: {part.module} is {type(module).__name__ if module else 'no module'} in the "
            f"live model; linear modules are allowed. {_ALONE}"
        )
    shape, dtype = tuple(module.weight.shape), module.weight.dtype
    if shape != part.shape or linear == part.transposed or not dtype.is_floating_point:
        raise MergeError(
            f"{name}: the live model has {shape} {dtype} in {type(module).__name__}, an adapter is "
            f"for {part.shape}, {'inputs' if part.transposed else 'outputs'} first. Load the model "
            "that the adapters are for, in a floating dtype."
        )


class LoraTogether:
    """A wrapped model: which candidates there are, and whose each row of the next batches is.

    Made by `wrap`. Until `unwrap`, or the end of a `with` block, the model computes nothing but
    batches of as many rows as were assigned.
    """

    def __init__(self, stacks: Mapping[str, "_Stack"], num_adapters: int) -> None:
        self._stacks, self._num_adapters, self._num_candidates = stacks, num_adapters, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unwrap()

    def set_candidates(self, candidates: Sequence[Coefficients]) -> None:
        """Take the coefficients of K candidates; rows have to be assigned anew.

        Args:
            candidates: For each, one coefficient of any sign per adapter, for each tensor that an
                adapter adds to; see `coefficients_of`.

        Raises:
            MergeError: There are none, or one has other tensors, or more or fewer coefficients.
        """
        if not candidates:
            raise MergeError("candidates: there are none; give the coefficients of one or more.")
        for number, candidate in enumerate(candidates):
            self._check(number, candidate)
        for name, stack in self._stacks.items():
            stack.take([candidate[name] for candidate in candidates])
        self._num_candidates = len(candidates)

    def _check(self, number: int, candidate: Coefficients) -> None:
        if different := sorted(candidate.keys() ^ self._stacks.keys()):
            has = "has" if different[0] in candidate else "has no"
            raise MergeError(
                f"candidate {number}: {has} coefficients for {different[0]}. Give them for the "
                "tensors that the adapters add to, and no others."
            )
        for name, given in candidate.items():
            if len(given) != self._num_adapters:
                raise MergeError(
                    f"candidate {number}: has {len(given)} coefficients for {name}. "
                    f"Give one for each of the {self._num_adapters} adapters."
                )

    def assign_rows(self, candidate_of_row: Sequence[int]) -> None:
        """Say which candidate computes each row of the batches that follow, until the next call.

        Args:
            candidate_of_row: A number from 0 to K - 1 for each row, in any order.

        Raises:
            MergeError: A row is for a candidate that there is not.
        """
        for row, number in enumerate(candidate_of_row):
            if not 0 <= number < self._num_candidates:
                raise MergeError(
                    f"row {row}: is for candidate {number}, and {self._num_candidates} are set, "
                    "numbered from 0. Set the candidates first, then assign rows to them."
                )
        for stack in self._stacks.values():
            stack.assign(candidate_of_row)

    def unwrap(self) -> None:
        """Leave the model as it was before `wrap`. Calling it again does nothing."""
        for stack in self._stacks.values():
            stack.hook.remove()


class _Stack:
    """The factors of all adapters of one module, and what they add to its output."""

    def __init__(self, name: str, module: Any, parts: Mapping[int, LowRank]) -> None:
        self._name, self._parts, weight = name, parts, module.weight
        self._a_SI = torch.cat([part.a_RI for part in parts.values()]).to(weight)
        self._b_OS = torch.cat([part.b_OR for part in parts.values()], 1).to(weight)
        self._lam_KS = self._lam_R1S = weight.new_empty(0)
        self.hook = module.register_forward_hook(self._add)

    def take(self, coefficients_KM: Sequence[Sequence[float]]) -> None:
        lam_KS = [
            [row[i] * part.scale for i, part in self._parts.items() for _ in range(part.rank)]
            for row in coefficients_KM
        ]
        # a coefficient is never held in fewer bits than float32 has
        dtype = torch.promote_types(self._a_SI.dtype, torch.float32)
        self._lam_KS = torch.tensor(lam_KS, dtype=dtype, device=self._a_SI.device)
        self._lam_R1S = self._lam_KS[:0]

    def assign(self, candidate_of_row: Sequence[int]) -> None:
        self._lam_R1S = self._lam_KS[list(candidate_of_row)].unsqueeze(1)

    def _add(
        self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out_RTO: torch.Tensor
    ) -> None:
        (x_RTI,) = inputs
        if x_RTI.ndim != 3 or len(x_RTI) != len(self._lam_R1S):
            raise MergeError(
                f"{self._name}: its module got {tuple(x_RTI.shape)}, and {len(self._lam_R1S)} rows "
                "are assigned; (rows, positions, inputs) is needed. Assign the rows of this batch; "
                "models that mix rows, as experts do, cannot be scored together."
            )
        # lam is never narrower than float32: multiplied in its dtype, then rounded once
        h_RTS = torch.nn.functional.linear(x_RTI, self._a_SI).mul_(self._lam_R1S)
        # into the module's own output: no second pass over it
        out_RTO.view(-1, len(self._b_OS)).addmm_(h_RTS.flatten(0, 1), self._b_OS.T)
