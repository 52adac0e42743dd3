"""Compiler: C sources of the kernels, compiled on the user's machine when first needed.

No wheel has to be built for every system, and the code is made for the very CPU it runs on. What
comes out is kept in a folder of the user's under a name that says what it was made from, so it is
made once. A machine that cannot compile merges all the same, by the reference.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_NAMES = ("cc", "gcc", "clang")
_TIME_LIMIT_S = 300

_FLAGS = (
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
    "-std=gnu11",
    "-O3",
    "-shared",
    "-fPIC",
    # never -ffast-math, and no fused multiply-add: every bit counts
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)


def missing(*sources: Path) -> str | None:
    """Tell why this machine cannot compile and load C sources, in one line; None where it can.

    Args:
        sources: As for `load`; without any, only whether there is a compiler is found out.
    """
    if not sources:
        command = _compiler()
        return command if isinstance(command, str) else None
    library = _library(sources)
    return library if isinstance(library, str) else None


def load(source: Path, *more_sources: Path) -> ctypes.CDLL | None:
    """Return C sources as a loaded library, compiled if no process of the user's has done so.

    `$CC` names the compiler, with its arguments if it has any; else it is the first that is found
    of cc, gcc and clang. Libraries are kept in `$XDG_CACHE_HOME/evomerge/kernels`, or else in
    `~/.cache/evomerge/kernels`; where that cannot be used, each process makes its own.

    Args:
        source: A C file.
        more_sources: Other C files, and every header that they include of their own.

    Returns:
        The same object however often a process asks; None where it cannot be had, and `missing`
        tells why.
    """
    library = _library((source, *more_sources))
    return None if isinstance(library, str) else library


@functools.cache
def _library(sources: tuple[Path, ...]) -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    command = _compiler()
    if isinstance(command, str):
        return command
    try:
        name = f"{sources[0].stem}-{_fingerprint(command, sources)}.so"
        with contextlib.suppress(OSError):
            return _loaded(command, sources, _cache_folder() / name)
        # a loaded library does not need its file any more
        with tempfile.TemporaryDirectory(prefix="evomerge-") as folder:
            return _loaded(command, sources, Path(folder) / name)
    except subprocess.CalledProcessError as failure:
        return f"{shlex.join(command)} cannot compile {sources[0].name}: {_complaint(failure)}"
    except (OSError, subprocess.TimeoutExpired) as failure:
        return f"{sources[0].name} cannot be compiled and loaded: {failure}"


def _loaded(command: tuple[str, ...], sources: tuple[Path, ...], path: Path) -> ctypes.CDLL:
    if path.exists():
        # one that does not load is made again
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    _compile(command, sources, path)
    return ctypes.CDLL(str(path))


def _compile(command: tuple[str, ...], sources: tuple[Path, ...], path: Path) -> None:
    """Write a library under its name all at once: other processes see none of it, or all."""
    files = [str(source) for source in sources if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        _output((*command, *_FLAGS, *files, "-o", str(made), "-lm"))
        os.replace(made, path)


def _cache_folder() -> Path:
    """Return the user's folder for libraries, which only the user can write to."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "evomerge" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _fingerprint(command: tuple[str, ...], sources: tuple[Path, ...]) -> str:
    """Return 16 hexadecimal digits for all that the library depends on."""
    parts = [
        *(source.read_bytes() for source in sources),
        shlex.join((*command, *_FLAGS)).encode(),
        _output((*command, "--version")).encode(),
        _cpu().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    """Return what the CPU can do: the nodes of a cluster share a home and not always that."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def _compiler() -> tuple[str, ...] | str:
    """Return the compiler's command line, or why there is none."""
    chosen = tuple(shlex.split(os.environ.get("CC", "")))
    if chosen:
        found = shutil.which(chosen[0])
        return chosen if found else f"CC is {shlex.join(chosen)!r}, which is not found"
    names = [name for name in _NAMES if shutil.which(name)]
    return (names[0],) if names else f"no C compiler ({', '.join(_NAMES)}) is found"


def _output(command: tuple[str, ...]) -> str:
    """Run a command; return what it prints."""
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIME_LIMIT_S,
        env={**os.environ, "LC_ALL": "C"},
    )
    return run.stdout


def _complaint(failure: subprocess.CalledProcessError) -> str:
    """Return a compiler's first error."""
    lines = failure.stderr.strip().splitlines() or [f"exit code {failure.returncode}"]
    return next((line for line in lines if "error" in line), lines[0]).strip()
