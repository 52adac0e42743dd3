"""Compiling on the user's machine: once, never torn, and never in a merge's way."""

import os
import stat
import subprocess
import sys

import pytest

from evomerge.kernels import compiler

needs_compiler = pytest.mark.skipif(compiler.missing() is not None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No memory of what was compiled, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget():
    compiler._library.cache_clear()
    compiler._compiler.cache_clear()


def write(folder, body="return 41 + STEP;", step=1):
    (folder / "step.h").write_text(f"#define STEP {step}\n")
    (folder / "number.c").write_text(f'#include "step.h"\nint number(void) {{ {body} }}\n')
    return folder / "number.c", folder / "step.h"


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "evomerge" / "kernels").iterdir())


@needs_compiler
def test_a_library_is_compiled_once(tmp_path, monkeypatch):
    sources = write(tmp_path)
    library = compiler.load(*sources)
    assert library.number() == 42
    assert compiler.missing(*sources) is None
    assert compiler.load(*sources) is library
    (path,) = cached(tmp_path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    forget()
    monkeypatch.setattr(compiler, "_compile", None)  # must not be called again
    assert compiler.load(*sources).number() == 42


@needs_compiler
def test_what_a_library_depends_on_makes_another(tmp_path, monkeypatch):
    assert compiler.load(*write(tmp_path)).number() == 42
    forget()
    assert compiler.load(*write(tmp_path, step=2)).number() == 43
    assert len(cached(tmp_path)) == 2
    forget()
    monkeypatch.setattr(compiler, "_cpu", lambda: "flags: another")
    assert compiler.load(*write(tmp_path, step=2)).number() == 43
    assert len(cached(tmp_path)) == 3


@needs_compiler
def test_a_torn_library_is_made_again(tmp_path):
    sources = write(tmp_path)
    # another process: this one would not look at a file that it has loaded
    start(sources).communicate()
    (path,) = cached(tmp_path)
    path.write_bytes(b"\x7fELF torn")
    assert compiler.load(*sources).number() == 42
    assert path.stat().st_size > 1000


@needs_compiler
def test_processes_at_once_do_not_see_half_a_library(tmp_path):
    sources = write(tmp_path)
    runs = [start(sources) for _ in range(2)]
    assert [run.communicate()[0] for run in runs] == ["42\n", "42\n"]
    assert len(cached(tmp_path)) == 1


def start(sources):
    code = (
        "import sys; from pathlib import Path; from evomerge.kernels import compiler;"
        "print(compiler.load(*map(Path, sys.argv[1:])).number())"
    )
    command = [sys.executable, "-c", code, *map(str, sources)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@needs_compiler
def test_a_cache_folder_that_cannot_be_made_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert compiler.load(*write(tmp_path)).number() == 42


@needs_compiler
def test_a_failure_is_told_and_not_raised(tmp_path):
    sources = write(tmp_path, body="return nothing_of_that_name;")
    assert compiler.load(*sources) is None
    why = compiler.missing(*sources)
    assert "number.c" in why
    assert "nothing_of_that_name" in why
    assert "\n" not in why
    assert compiler.missing() is None
    assert cached(tmp_path) == []


def test_no_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    sources = write(tmp_path)
    assert compiler.load(*sources) is None
    assert compiler.missing() == compiler.missing(*sources)
    assert "no C compiler (cc, gcc, clang)" in compiler.missing()


def test_cc_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert compiler.missing() == "CC is 'no-such-compiler -m64', which is not found"
    called = tmp_path / "called"
    mine = tmp_path / "mine"
    mine.write_text(f'#!/bin/sh\necho "$@" >> {called}\nexit 7\n')
    os.chmod(mine, 0o700)
    monkeypatch.setenv("CC", f"{mine} -DSTEP=1")
    forget()
    why = compiler.missing(*write(tmp_path))
    assert called.read_text().startswith("-DSTEP=1 --version")
    assert "exit code 7" in why
