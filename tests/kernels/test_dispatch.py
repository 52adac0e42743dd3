"""Which implementation runs, and that one which is missing stops no merge."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest

from evomerge.kernels import compiler, dispatch, native
from tests.contracts.kernel import make_job, poisoned

needs_compiler = pytest.mark.skipif(compiler.missing() is not None, reason="no C compiler")


def test_the_reference_is_last_and_never_missing():
    assert dispatch.KERNELS[-1] is dispatch.REFERENCE
    assert dispatch.REFERENCE.missing() is None
    names = [kernels.name for kernels in dispatch.KERNELS]
    assert len(set(names)) == len(names)


def unfused(job):
    """The same job with an expression that only the reference runs."""
    return dataclasses.replace(job, table=dataclasses.replace(job.table, fused=None))


@needs_compiler
def test_each_job_goes_to_the_first_that_can():
    rng = random.Random(1)
    jobs = [
        make_job(rng, "span", 1000, 2),
        unfused(make_job(rng, "sce", 700, 2)),
        make_job(rng, "mask", 600, 3),
    ]
    copies = [
        dataclasses.replace(job, out_P=poisoned(len(job.out_P), job.out_P.dtype)) for job in jobs
    ]
    written, ran = dispatch.carry_out_all(jobs)
    assert ran == ("native", "reference")
    assert written == dispatch.REFERENCE.carry_out_all(copies)
    assert dispatch.carry_out_all(jobs[1:2])[1] == ("reference",)
    assert dispatch.carry_out_all(jobs[::2])[1] == ("native",)
    assert dispatch.carry_out_all([]) == ([], ())


def test_without_a_compiler_the_reference_runs(tmp_path):
    """In a process of its own: nothing is compiled yet, and no compiler is on the path."""
    code = (
        "import torch; from evomerge.kernels import dispatch, native;"
        "from evomerge.kernels.launch import KernelJob; from evomerge.kernels.tables import Span;"
        "out = torch.empty(3); job = KernelJob(Span((2.0,)), None, [torch.ones(3)], out);"
        "print(dispatch.carry_out_all([job])[1], out.tolist(), native.missing())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    environment |= {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.startswith("('reference',) [2.0, 2.0, 2.0] no C compiler (cc, gcc, clang)")


def test_a_source_that_does_not_compile_stops_no_merge(monkeypatch, tmp_path):
    broken = tmp_path / "native.c"
    broken.write_text("int carry_out(")
    monkeypatch.setattr(native, "_SOURCES", (broken,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = make_job(random.Random(2), "mask", 100, 2)
    written, ran = dispatch.carry_out_all([job])
    assert ran == ("reference",)
    assert len(written) == 1
    assert native.missing()
