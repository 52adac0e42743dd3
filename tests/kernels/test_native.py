"""The kernels in C: the contract, and what belongs to this implementation alone."""

import dataclasses
import random

import pytest
import torch

from evomerge.kernels import native
from evomerge.kernels.dispatch import NATIVE
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import DITHER, GROUP, MaskKey, random_words
from evomerge.kernels.tables import Local, Mask, Span
from evomerge.methods import METHODS
from tests.contracts.kernel import (
    TABLES,
    KernelContract,
    assert_same,
    make_job,
    method_job,
    poisoned,
)

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

NOT_OURS = {"arcee_fusion", "fourier", "iso_c", "pcb", "tsv"}


@pytest.fixture(scope="module")
def kernels():
    return NATIVE


class TestNative(KernelContract):
    """Every promise, kept by this implementation."""


@pytest.mark.parametrize("method", METHODS)
def test_which_methods_it_runs(method):
    row = METHODS[method]
    job = method_job(
        row, max(min(3, row.max_parents or 3), row.min_parents), (40, 8), torch.float32
    )
    assert native.can_run(job) is (method not in NOT_OURS)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads):
    """More elements than one thread takes, and more than one unit for each."""
    before = torch.get_num_threads()
    rng = random.Random(3)
    jobs = [make_job(rng, name, 150_001, 3) for name in TABLES]
    jobs += [make_job(rng, "span", size, 3) for size in (0, 3, 40_000)]
    try:
        torch.set_num_threads(threads)
        assert_same(NATIVE, jobs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", [0, 1])
def test_draws_the_numbers_of_masks(group):
    """A level tells each number's place: kept where the number is below it."""
    size, first = 700, 8
    key = MaskKey(9, "name")
    words = random_words(key, group, first, size)
    for i, word in enumerate(words):
        num_models = GROUP * group + i + 1
        level = int(word.median())
        levels = (2**32,) * (num_models - 1) + (level,)
        zeros = [torch.zeros(size)] * (num_models - 1)
        ones = (1.0,) * num_models
        mask = Mask(ones, ones, (0.0,) * num_models, levels, key)
        out = poisoned(size, torch.float32)
        job = KernelJob(mask, torch.zeros(size), [*zeros, torch.ones(size)], out, first=first)
        native.carry_out_all([job])
        assert torch.equal(out == 1, word < level)


def test_dithers_with_the_numbers_of_masks():
    size, key = 700, MaskKey(2**32 - 1, "name")
    out = poisoned(size, torch.bfloat16)
    # 1 + 77 / 512 of a step to the next bfloat16
    merged = torch.full((size,), 1.0 + 77 * 2.0**-16)
    native.carry_out_all([KernelJob(Span((1.0,)), None, [merged], out, key, first=16)])
    word = random_words(key, DITHER, 16, size)[0] & 0xFFFF
    assert torch.equal(out > 1, 77 * 2**7 + word >= 2**16)


def test_leaves_what_it_cannot_do():
    rng = random.Random(0)
    job = make_job(rng, "mask", 100, 2)
    two = torch.zeros(100, 2)
    assert native.can_run(job)
    assert not native.can_run(dataclasses.replace(job, base_P=None))
    assert not native.can_run(dataclasses.replace(job, source_MP=job.source_MP[:1]))
    assert not native.can_run(dataclasses.replace(job, base_P=two[:, 0]))
    assert not native.can_run(dataclasses.replace(job, base_P=job.base_P[:99]))
    assert not native.can_run(dataclasses.replace(job, base_P=job.base_P.double()))
    assert not native.can_run(dataclasses.replace(job, out_P=job.out_P.to("meta")))
    assert not native.can_run(dataclasses.replace(job, table=Local(sum)))
    short = torch.zeros(99, dtype=torch.uint8)
    table = Mask((1.0,) * 2, (1.0,) * 2, (0.0,) * 2, (5, 5), MaskKey(0, ""), ranks=(short, None))
    table = dataclasses.replace(table, rank_steps=(1, 0))
    assert not native.can_run(dataclasses.replace(job, table=table, first=0))
