"""The hidden folder in which a checkpoint grows: its name, its journal, what dead processes left.

The journal has a line for the whole, which tells what the checkpoint is made of, and a line for
each shard that is complete and on the disk, with the checksums of its tensors.
"""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from evomerge.checksums import Checksum

JOURNAL = "evomerge-journal.jsonl"
"""Name of the journal; it is removed before the folder appears."""

Finished = dict[str, dict[str, Checksum]]
"""File name of a finished shard -> its tensors' names and checksums."""


def partial_path(folder: Path, pid: int | str) -> Path:
    """Return the hidden folder in which a process of this host writes the checkpoint `folder`."""
    # the host is named because a pid says nothing to another machine that shares the disk
    return folder.parent / f".{folder.name}.partial-{socket.gethostname()}-{pid}"


def leftovers(folder: Path) -> list[Path]:
    """Return the hidden folders of `folder` that dead processes of this host left, sorted."""
    # our own pid too: in a container a restarted process often gets the same one
    stem = partial_path(folder, "").name
    found = []
    for path in folder.parent.iterdir():
        start, pid = path.name[: len(stem)], path.name[len(stem) :]
        if start != stem or not pid.isdecimal():
            continue
        if int(pid) == os.getpid() or not _is_alive(int(pid)):
            found.append(path)
    return sorted(found)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_journal(partial: Path, identity: str) -> Finished:
    """Return the finished shards of a hidden folder; none where it grew for another identity."""
    try:
        lines = (partial / JOURNAL).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    finished: Finished = {}
    try:
        if not lines or json.loads(lines[0]) != {"identity": identity}:
            return {}
        for line in lines[1:]:
            entry = json.loads(line)
            finished[entry["file"]] = {
                name: Checksum(dtype, tuple(shape), value)
                for name, (dtype, shape, value) in entry["checksums"].items()
            }
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # the process ended within its last line; what stands before it holds
    return finished


def start_journal(partial: Path, identity: str, finished: Finished) -> None:
    """Write the journal anew; until it is complete the old one stays."""
    lines = [json.dumps({"identity": identity})]
    lines += [_line(file, checksums) for file, checksums in finished.items()]
    draft = partial / f"{JOURNAL}.new"
    _append(draft, lines)
    draft.replace(partial / JOURNAL)


def note_shard(partial: Path, file: str, checksums: Mapping[str, Checksum]) -> None:
    """Add a shard to the journal; its file has been synced."""
    _append(partial / JOURNAL, [_line(file, checksums)])


def _line(file: str, checksums: Mapping[str, Checksum]) -> str:
    return json.dumps({"file": file, "checksums": checksums})


def _append(path: Path, lines: list[str]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def adopt(left: Path, partial: Path, keep: Finished) -> None:
    """Make a dead process's hidden folder this one's, with nothing in it but finished shards.

    Raises:
        FileNotFoundError: Another process was faster.
    """
    if left != partial:
        left.rename(partial)
    for path in partial.iterdir():
        if path.name in keep or path.name == JOURNAL:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
