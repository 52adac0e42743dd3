"""Items: which documents of a split have which role, and how a role's items are cut into chunks.

Every decision is a hash of the seed and of what is decided on, never a state of a generator: the
same on every worker, and nested, so that a raised count only adds items.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from evomerge.config.suite import ItemRole
from evomerge.evaluate.plain import digest
from evomerge.seeds import stream_seed

Strata = Mapping[str, Sequence[int]]
"""Value of the field that draws are stratified by → document numbers that have it."""

Used = Mapping[str, Mapping[str, Collection[int]]]
"""Task → split → document numbers that no role but search gets any more."""

IDENTIFIERS = frozenset(
    {"id", "_id", "idx", "ind", "index", "uid", "guid", "qid", "doc_id", "question_id"}
)
"""Fields that number documents; two documents that differ only there are the same."""


def content_hash(document: Mapping[str, object]) -> str:
    """Return a hash of what a document says, without the fields that only number it."""
    return digest({k: v for k, v in document.items() if k.lower() not in IDENTIFIERS})


def text_hash(document: Mapping[str, object]) -> str:
    """Return a hash that documents share which differ only in case, white space or Unicode forms.

    Data sets are copied, cleaned and re-published, which changes just that; such an item gives its
    answer away like the item itself. Digits, punctuation and the order of choices count.
    """
    return digest(_folded({k: v for k, v in document.items() if k.lower() not in IDENTIFIERS}))


def first_copies(hashes: Sequence[str]) -> list[int]:
    """Return the numbers of the documents that equal no earlier one, ascending."""
    first: dict[str, int] = {}
    for i, content in enumerate(hashes):
        first.setdefault(content, i)
    return list(first.values())


def draw_order(strata: Strata, seed: int) -> list[int]:
    """Return all documents in a seeded order whose every stretch has each stratum in proportion.

    Documents of a stratum of size n are spread evenly over the order, the first at a seeded place
    within its 1/n, so that any stretch holds its share of each stratum up to rounding.

    Args:
        strata: Documents by the value that is to keep its proportion.
        seed: Seed of this draw.
    """
    places: list[tuple[float, int, int]] = []
    for value, ids in strata.items():
        shift = stream_seed(seed, "stratum", value) / 2**63
        for rank, i in enumerate(_shuffled(ids, seed)):
            places.append(((rank + shift) / len(ids), _key(i, seed), i))
    return [i for _, _, i in sorted(places)]


def draw_roles(
    order: Sequence[int], counts: Mapping[ItemRole, int | None]
) -> dict[ItemRole, list[int]]:
    """Give each role its documents of one split, without overlap.

    Search takes from the front of the order, confirm from the back, report around the middle: each
    role's items are nested in its count, and stay what they are when another role's count is
    raised, as long as there is room between them.

    Args:
        order: Documents in the order of the draw.
        counts: How many each role takes; None, for one role at most, is all that the others leave.
            Their sum does not exceed the number of documents.

    Returns:
        For each role its document numbers, ascending.
    """
    size = len(order)
    front, back = counts.get("search") or 0, counts.get("confirm") or 0
    middle = counts.get("report") or 0
    start = min(max(size // 2 - middle // 2, front), size - back - middle)
    windows: dict[ItemRole, Sequence[int]] = {
        "search": order[:front],
        "confirm": order[size - back :],
        "report": order[start : start + middle],
    }
    taken = {i for ids in windows.values() for i in ids}
    rest = [i for i in order if i not in taken]
    return {
        role: sorted(windows[role] if count is not None else rest) for role, count in counts.items()
    }


def deal(
    strata_by_task: Mapping[str, Strata], num_chunks: int, seed: int
) -> list[dict[str, tuple[int, ...]]]:
    """Deal a role's items out to chunks, so that each is a small image of the whole.

    Over the chunks, the number of items, of items of each task, and of items of each stratum differ
    by one at most.

    Args:
        strata_by_task: The role's items of each task, by stratum.
        num_chunks: Chunks wanted, at least 1; fewer come when there are fewer items.
        seed: Decides which items of a stratum go together.

    Returns:
        For each chunk, the items of each task that has any in it, ascending.
    """
    queue = [
        (task, i)
        for task, strata in strata_by_task.items()
        for value in sorted(strata)
        for i in _shuffled(strata[value], seed)
    ]
    parts = [queue[k::num_chunks] for k in range(min(num_chunks, len(queue)))]
    chunks = []
    for part in parts:
        ids = {task: tuple(sorted(i for t, i in part if t == task)) for task in strata_by_task}
        chunks.append({task: members for task, members in ids.items() if members})
    return chunks


def _folded(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, Mapping):
        return {key: _folded(member) for key, member in value.items()}
    return [_folded(member) for member in value] if isinstance(value, list | tuple) else value


def _shuffled(ids: Sequence[int], seed: int) -> list[int]:
    return sorted(ids, key=lambda i: (_key(i, seed), i))


def _key(document: int, seed: int) -> int:
    return stream_seed(seed, "document", str(document))
