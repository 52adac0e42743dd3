"""Packed log-likelihoods: contexts are read once, and logits made only where something is scored.

Letters: B rows, T tokens of a row, K tokens that a row may look at (prefix and row), S scored
places, N targets, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evomerge.evaluate.packed_plan import Row, ScoredRequest, make_groups

SLICE = 256
"""Scored places whose logits are turned into float32 at a time."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""How far a packed log-likelihood may lie from one computed alone, per token and per nat.

In 16 bits this is an eps of the dtype: a logit is stored to within half of it. Over some 25
families of tiny models the largest difference was 1/7 of it in bfloat16, 1/5 in float16 and 1/70 in
float32, where deep models need room. Models that do not take the mask differed by more than twice.
"""


@dataclass(frozen=True)
class PackedBatch:
    """Padded rows on the device, without the prefix that they share.

    Attributes:
        ids_BT: Tokens.
        positions_BT: Positions of the tokens in their own requests.
        segments_BT: The trunk is 0, branches count from 1, padding is -1. None where nothing
            branches and no prefix is shared: then plain causal attention is right.
        trunk: Tokens that are in the trunk of every row.
        places_S: Where targets are predicted, as indices into the flattened rows, ascending.
        place_of_target_N: Index into `places_S` of each target.
        targets_N: The targets, a request's in a row.
        requests: Number of the request and how many targets it has, in the order of the targets.
    """

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor | None
    trunk: int
    places_S: torch.Tensor
    place_of_target_N: torch.Tensor
    targets_N: torch.Tensor
    requests: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedPlan:
    """Everything about some requests that does not depend on weights.

    Attributes:
        groups: For each shared prefix, its tokens (1, T), None where there is none, and the batches
            that begin with it.
    """

    groups: tuple[tuple[torch.Tensor | None, tuple[PackedBatch, ...]], ...]


def make_plan(
    requests: Mapping[int, ScoredRequest],
    least_saved: int | None,
    batch_size: int,
    device: torch.device | str,
) -> PackedPlan:
    """Put requests into rows, and rows into batches on a device.

    A batch holds at most as many tokens as `batch_size` times the longest request has, which is the
    largest batch without packing.

    Args:
        requests: By number.
        least_saved: Tokens that a prefix must save to be shared; None shares none.
        batch_size: Of the longest request.
        device: Where the model is.
    """
    budget = batch_size * max((len(request.tokens) for request in requests.values()), default=1)
    planned = []
    for group in make_groups(requests, least_saved):
        prefix = torch.tensor([group.prefix], device=device) if group.prefix else None
        batches = tuple(
            _batch(requests, rows, len(group.prefix), device) for rows in group.batches(budget)
        )
        planned.append((prefix, batches))
    return PackedPlan(tuple(planned))


def _batch(
    requests: Mapping[int, ScoredRequest],
    rows: Sequence[Row],
    skipped: int,
    device: torch.device | str,
) -> PackedBatch:
    width = max(len(row.tokens) for row in rows) - skipped
    # padding repeats a token of its own row: what is wrong with another one cannot reach it
    ids = [_padded(row.tokens[skipped:], width, row.tokens[0]) for row in rows]
    positions = [_padded(row.positions[skipped:], width, 0) for row in rows]
    segments = [_padded(row.segments[skipped:], width, -1) for row in rows]
    places: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        for request, scored in row.places:
            places += [number * width + place - skipped for place in scored]
            targets += requests[request].targets
            owners.append((request, len(scored)))
    unique = sorted(set(places))
    index = {place: i for i, place in enumerate(unique)}
    plain = not skipped and not any(row.branches for row in rows)
    return PackedBatch(
        ids_BT=torch.tensor(ids, device=device),
        positions_BT=torch.tensor(positions, device=device),
        segments_BT=None if plain else torch.tensor(segments, device=device),
        trunk=min(row.segments.count(0) for row in rows) - skipped,
        places_S=torch.tensor(unique, device=device),
        place_of_target_N=torch.tensor([index[place] for place in places], device=device),
        targets_N=torch.tensor(targets, device=device),
        requests=tuple(owners),
    )


def _padded(values: Sequence[int], width: int, filler: int) -> list[int]:
    return [*values, *[filler] * (width - len(values))]


@torch.no_grad()
def score_plan(model: Any, plan: PackedPlan) -> dict[int, tuple[float, bool]]:
    """Score requests on a model; keys and values of a prefix live only during this call.

    Args:
        model: A transformers causal language model that takes a mask for each pair of tokens.
        plan: From `make_plan`.

    Returns:
        For each request that is in the plan, by number: the sum of the log-probabilities of its
        targets, and whether each of them is the most probable token.
    """
    requests: list[tuple[int, int]] = []
    logprobs, hits = [], []
    for prefix, batches in plan.groups:
        past = _read_prefix(model, prefix) if prefix is not None else None
        for batch in batches:
            logprob_N, hit_N = _score_batch(model, batch, past)
            requests += batch.requests
            logprobs.append(logprob_N)
            hits.append(hit_N)
    if not requests:
        return {}
    # the only time that the host waits for the device
    logprob, hit = torch.cat(logprobs).double().cpu().numpy(), torch.cat(hits).cpu().numpy()
    starts = np.cumsum([0, *(length for _, length in requests[:-1])])
    sums, all_hit = np.add.reduceat(logprob, starts), np.logical_and.reduceat(hit, starts)
    answers = zip(sums.tolist(), all_hit.tolist(), strict=True)
    return {number: answer for (number, _), answer in zip(requests, answers, strict=True)}


def _score_batch(
    model: Any, batch: PackedBatch, past: list[tuple[torch.Tensor, torch.Tensor]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments: dict[str, Any] = {"use_cache": past is not None}
    if past is not None:
        arguments["past_key_values"] = _spread(past, len(batch.ids_BT))
    if batch.segments_BT is not None:
        arguments["position_ids"] = batch.positions_BT
        skipped = past[0][0].shape[-2] if past is not None else 0
        arguments["attention_mask"] = _mask(batch.segments_BT, batch.trunk, skipped, model.dtype)
    logits_SV = _logits_at(model, batch.ids_BT, batch.places_S, **arguments).logits[0]
    return _logprobs(logits_SV, batch.place_of_target_N, batch.targets_N)


def _read_prefix(model: Any, ids_1T: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of each layer for the tokens that rows share."""
    last = torch.tensor([ids_1T.shape[1] - 1], device=ids_1T.device)
    cache = _logits_at(model, ids_1T, last, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def _spread(past: list[tuple[torch.Tensor, torch.Tensor]], rows: int) -> Any:
    """Return a cache that holds the same keys and values in every row."""
    from transformers import DynamicCache

    return DynamicCache(
        [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in past]
    )


def _mask(segments_BT: torch.Tensor, trunk: int, skipped: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to attention scores, (B, 1, T, K): a token sees the trunk and its own.

    Args:
        segments_BT: As in `PackedBatch`.
        trunk: Columns in which every row has its trunk, and which are causal.
        skipped: Tokens of the prefix, which everyone sees.
        dtype: Of the model.
    """
    lowest, width = torch.finfo(dtype).min, segments_BT.shape[1]
    mask = segments_BT.new_empty((len(segments_BT), 1, width, skipped + width), dtype=dtype)
    mask[..., :skipped] = 0
    own_BTT = mask[:, 0, :, skipped:]
    own_BTT[:] = torch.full((width, width), lowest, dtype=dtype, device=mask.device).triu(1)
    key_B1T, query_BT1 = segments_BT[:, None, :], segments_BT[:, trunk:, None]
    own_BTT[:, trunk:].masked_fill_((key_B1T != 0) & (key_B1T != query_BT1), lowest)
    return mask


def _logits_at(model: Any, ids_BT: torch.Tensor, places_S: torch.Tensor, **arguments: Any) -> Any:
    """Run a model, its head only at some places; logits are (1, S, V).

    What a model does to its logits after the head (a scale, a soft cap) is done as ever.
    """
    picked = _Picked(places_S)
    hook = model.get_output_embeddings().register_forward_pre_hook(picked)
    try:
        output = model(input_ids=ids_BT, **arguments)
    finally:
        hook.remove()
    if not picked.fired:
        raise TypeError("the model does not call its output embedding")
    return output


class _Picked:
    """A hook that leaves only some places of the hidden states that go into the head."""

    def __init__(self, places_S: torch.Tensor) -> None:
        self._places_S = places_S
        self.fired = False

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.fired = True
        return args[0].flatten(0, -2)[self._places_S][None]


def _logprobs(
    logits_SV: torch.Tensor, place_of_target_N: torch.Tensor, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability, float32, and whether it is the most probable token.

    The softmax is taken in float32, a slice of places at a time.
    """
    highest, likeliest, total = [], [], []
    for logits in logits_SV.split(SLICE):
        wide = logits.float()
        likeliest.append(wide.argmax(-1))
        highest.append(wide.gather(-1, likeliest[-1][:, None]))
        total.append((wide - highest[-1]).exp().sum(-1).log())
    highest_S, likeliest_S, total_S = (
        torch.cat(highest)[:, 0],
        torch.cat(likeliest),
        torch.cat(total),
    )
    chosen_N = logits_SV[place_of_target_N, targets_N].float()
    logprob_N = chosen_N - highest_S[place_of_target_N] - total_S[place_of_target_N]
    return logprob_N, likeliest_S[place_of_target_N] == targets_N


def probe_requests(tokens: Sequence[int]) -> list[ScoredRequest]:
    """Return requests that branch, share a prefix, and are as long as those to be scored.

    Args:
        tokens: What the model reads for the longest request there is.
    """
    known = sorted(set(tokens))
    length = max(1, len(tokens) - 3)
    answer = len(tokens) - length + 1
    requests = []
    for document, context in enumerate((tokens[:length], tokens[: max(1, length // 2)])):
        for first in range(3):
            targets = tuple(known[(first + i) % len(known)] for i in range(answer))
            requests.append(ScoredRequest("probe", document, (*context, *targets[:-1]), targets))
    return requests


def why_not_packed(
    model: Any,
    requests: Sequence[ScoredRequest],
    expected: Sequence[float],
    share_prefixes: bool,
    device: torch.device | str,
) -> str | None:
    """Compare packed log-likelihoods with others; return what speaks against them, None if nothing.

    Args:
        model: The model as it is.
        requests: From `probe_requests`.
        expected: Their log-likelihoods, each request read on its own.
        share_prefixes: Read a prefix once for all rows.
        device: Where the model is.
    """
    least_saved = 1 if share_prefixes else None
    plan = make_plan(dict(enumerate(requests)), least_saved, len(requests), device)
    try:
        found = score_plan(model, plan)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code, given a mask it may not know
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    allowed = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    for number, (request, other) in enumerate(zip(requests, expected, strict=True)):
        if not abs(found[number][0] - other) <= allowed * (len(request.targets) + abs(other)):
            return f"it gives {found[number][0]:.6f} where each request alone gives {other:.6f}"
    return None
