"""Results per item, beside the study: a file for each recipe and role, a line for each chunk.

A chunk is written the moment it comes back, before its trial is recorded, so a killed search scores
no chunk twice. A line that was cut off by a kill is ignored and its chunk scored again. The results
within a line are packed (`study/packing.py`); lines of earlier versions hold them as plain JSON.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config.suite import ItemRole
from evomerge.errors import StudyError
from evomerge.evaluate.evaluator import EvalResult, TaskItems, Value
from evomerge.study.packing import pack, unpack


@dataclass(frozen=True)
class ScoredChunk:
    """One chunk's results and what they cost.

    Attributes:
        index: Number of the chunk within its role.
        result: Results per item.
        digest: Digest of the weights that were scored.
        worker: Who scored it.
        kernels: Which implementations of the kernels merged the weights.
        seconds_merge: Seconds spent on materialising the weights for it.
        seconds_score: Seconds spent on scoring it.
    """

    index: int
    result: EvalResult
    digest: str
    worker: str
    seconds_merge: float
    seconds_score: float
    kernels: tuple[str, ...] = ()


class ItemStore:
    """The folder of results per item; content-addressed by the recipe's hash.

    Args:
        folder: Made when it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, recipe_hash: str, role: ItemRole, chunk: ScoredChunk, turn: int = 1) -> None:
        """Append a chunk's results and force them to disk.

        Args:
            recipe_hash: Of the recipe that was scored.
            role: What the items are for.
            chunk: The results.
            turn: Number of the confirmation, from 1; each has items of its own.

        Raises:
            StudyError: The folder cannot be written.
        """
        path = self._path(recipe_hash, role, turn)
        line = json.dumps(_to_json(chunk), separators=(",", ":"), allow_nan=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                torn = file.tell() > 0 and _last_byte(file.fileno()) != b"\n"
                file.write((b"\n" if torn else b"") + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StudyError(
                f"{path}: results per item cannot be written ({error.strerror}). "
                "Make room or mend the folder, then resume."
            ) from None

    def read(self, recipe_hash: str, role: ItemRole, turn: int = 1) -> dict[int, ScoredChunk]:
        """Return the chunks that are stored for a recipe, by index."""
        path = self._path(recipe_hash, role, turn)
        if not path.exists():
            return {}
        chunks = {}
        for line in path.read_bytes().split(b"\n"):
            try:
                chunk = _from_json(json.loads(line))
                chunks[chunk.index] = chunk
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut off by a kill, no chunk, or the empty end of the file
        return chunks

    def copy(self, recipe_hash: str, other: str, role: ItemRole) -> None:
        """Store what is known of a recipe for another of the same merge, too."""
        known = self.read(other, role)
        for index, chunk in self.read(recipe_hash, role).items():
            if index not in known:
                self.add(other, role, chunk)

    def _path(self, recipe_hash: str, role: ItemRole, turn: int) -> Path:
        folder = role if turn == 1 else f"{role}-{turn}"
        return self._folder / folder / f"{recipe_hash[:32]}.jsonl"


def _last_byte(descriptor: int) -> bytes:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)


def _to_json(chunk: ScoredChunk) -> dict[str, Any]:
    return {
        "chunk": chunk.index,
        "digest": chunk.digest,
        "worker": chunk.worker,
        "kernels": chunk.kernels,
        "seconds_merge": chunk.seconds_merge,
        "seconds_score": chunk.seconds_score,
        "packed": pack({task: vars(items) for task, items in chunk.result.items()}),
    }


def _from_json(data: dict[str, Any]) -> ScoredChunk:
    tasks = unpack(data["packed"]) if "packed" in data else data["tasks"]
    result = {
        task: TaskItems(
            ids=tuple(items["ids"]),
            values=_columns(items["values"]),
            answers=_columns(items.get("answers", {})),
        )
        for task, items in tasks.items()
    }
    return ScoredChunk(
        index=data["chunk"],
        result=result,
        digest=data["digest"],
        worker=data["worker"],
        seconds_merge=data["seconds_merge"],
        seconds_score=data["seconds_score"],
        kernels=tuple(data.get("kernels", ())),
    )


def _columns(columns: dict[str, list[Value]]) -> dict[str, tuple[Value, ...]]:
    return {key: tuple(column) for key, column in columns.items()}
