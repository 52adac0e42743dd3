"""Plans of packed rows: what a model reads, so that what requests have in common is read once.

A row holds what requests of one document share, its trunk, and after it what each has of its own,
its branches. Rows of a task that begin alike leave that beginning, the prefix, to be read once for
all of them. A plan follows from tokens alone: it is the same for every candidate and worker.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

LEAST_SAVED = 256
"""Tokens that a prefix must save. Below, one more forward pass costs more than it spares."""


@dataclass(frozen=True)
class ScoredRequest:
    """One continuation to be scored.

    Attributes:
        task: Task it belongs to; prefixes are shared within a task.
        document: What it is about; rows are made within a document.
        tokens: What the model reads: the context and all but the last token of the continuation.
        targets: Tokens of the continuation; the last `len(targets)` positions predict them.
    """

    task: Hashable
    document: Hashable
    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def first_scored(self) -> int:
        """Position that predicts the first target."""
        return len(self.tokens) - len(self.targets)


@dataclass(frozen=True)
class Row:
    """Requests that are read together.

    Attributes:
        tokens: The trunk, then the branches.
        positions: Of each token in its own request.
        segments: 0 in the trunk, from 1 on the number of the branch.
        places: For each request, its number and where in the row its targets are predicted.
        shareable: Leading tokens that may be read elsewhere: nothing is scored in them.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[int, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]
    shareable: int

    @property
    def branches(self) -> int:
        """Number of branches that hold tokens."""
        return max(self.segments)


@dataclass(frozen=True)
class RowGroup:
    """Rows that begin with the same tokens, longest first, and either all branch or none does."""

    prefix: tuple[int, ...]
    rows: tuple[Row, ...]

    def batches(self, token_budget: int) -> Iterator[tuple[Row, ...]]:
        """Cut into batches of at most so many tokens, prefix and padding included, or of one row.

        Args:
            token_budget: Tokens per batch.
        """
        start = 0
        while start < len(self.rows):
            size = max(1, token_budget // len(self.rows[start].tokens))
            yield self.rows[start : start + size]
            start += size


def make_groups(
    requests: Mapping[int, ScoredRequest], least_saved: int | None = LEAST_SAVED
) -> tuple[RowGroup, ...]:
    """Put requests into rows and rows into groups, both ordered by their tokens.

    Args:
        requests: By number.
        least_saved: Tokens that a prefix must save to be shared; None shares none.
    """
    members: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, request in requests.items():
        members[request.task][request.document].append(number)
    grouped: dict[tuple[tuple[int, ...], bool], list[Row]] = defaultdict(list)
    for documents in members.values():
        rows = [row for numbers in documents.values() for row in _rows(requests, numbers)]
        prefix = _prefix(rows, least_saved)
        for row in rows:
            grouped[prefix, row.branches > 0].append(row)
    return tuple(
        RowGroup(prefix, tuple(sorted(rows, key=_longest_first)))
        for (prefix, _), rows in sorted(grouped.items(), key=lambda entry: entry[0])
    )


def _longest_first(row: Row) -> tuple[int, tuple[int, ...]]:
    return -len(row.tokens), row.tokens


def _rows(requests: Mapping[int, ScoredRequest], numbers: Sequence[int]) -> Iterator[Row]:
    """Make rows of a document's requests; one joins a row when that spares half of its tokens."""
    trunk: tuple[int, ...] = ()
    joined: list[int] = []
    for number in sorted(numbers, key=lambda n: requests[n].tokens):
        tokens = requests[number].tokens
        shared = _common(trunk, tokens)
        if joined and 2 * shared < len(tokens):
            yield _row(requests, joined, trunk)
            joined = []
        trunk = trunk[:shared] if joined else tokens
        joined.append(number)
    yield _row(requests, joined, trunk)


def _row(
    requests: Mapping[int, ScoredRequest], numbers: Sequence[int], trunk: tuple[int, ...]
) -> Row:
    tokens, positions, segments = list(trunk), list(range(len(trunk))), [0] * len(trunk)
    shift: dict[tuple[int, ...], int] = {}
    places = []
    for number in numbers:
        request = requests[number]
        branch = request.tokens[len(trunk) :]
        if branch not in shift:
            shift[branch] = len(tokens) - len(trunk)
            tokens += branch
            positions += range(len(trunk), len(request.tokens))
            segments += [max(segments) + 1] * len(branch)
        scored = range(request.first_scored, len(request.tokens))
        places.append((number, tuple(i if i < len(trunk) else i + shift[branch] for i in scored)))
    shareable = min(len(trunk), *(requests[n].first_scored for n in numbers))
    return Row(tuple(tokens), tuple(positions), tuple(segments), tuple(places), shareable)


def _prefix(rows: Sequence[Row], least_saved: int | None) -> tuple[int, ...]:
    """Return the tokens that all rows begin with, or none where too few would be saved."""
    if least_saved is None:
        return ()
    low, high = min(row.tokens for row in rows), max(row.tokens for row in rows)
    length = min(_common(low, high), *(row.shareable for row in rows), len(low))
    return low[:length] if length * (len(rows) - 1) >= least_saved else ()


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Return how many leading tokens are the same."""
    for i, (ours, theirs) in enumerate(zip(left, right, strict=False)):
        if ours != theirs:
            return i
    return min(len(left), len(right))
