"""Streaming gives the bits and checksums of one launch, in pieces of any size."""

import dataclasses

import pytest
import torch

from evomerge.kernels import reference, streamed
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.tables import Local, Mask, Span, TieCut, Whole

KEY = MaskKey(7, "model.layers.0.mlp.up_proj.weight")
SPAN = Span((0.3, -0.9), 1.0, True)
SIZE = 30_001


def every(tensor, device):
    return True


def make_models(size, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator)
    sources = [base + 0.01 * torch.randn(size, generator=generator) for _ in range(2)]
    return base.to(dtype), [source.to(dtype) for source in sources]


def ranks(size):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator) for _ in range(2)
    )


def turned(base, sources):
    return (base.t() @ sources[0] + sources[1]).contiguous()


def halfway(base, sources):
    return sources[0] * 0.5 + sources[1]


MASK = Mask(
    (0.5, 0.7),
    (0.5, 0.7),
    (0.002, 0.0),
    (KEEP_ALL, 2**31),
    KEY,
    elect=True,
    normalize=True,
    tie_cuts=(TieCut(0.0021, end=20_000), None),
)
DELLA = Mask(
    (0.5, 0.7),
    (0.5, 0.7),
    (0.0, 0.0),
    (2**30, 2**29),
    KEY,
    rank_steps=(2**22, 2**21),
    ranks=ranks(SIZE),
)
TABLES = {"span": SPAN, "mask": MASK, "della": DELLA, "local": Local(halfway)}


def jobs_of(table, size=SIZE, dtype=torch.bfloat16, **changes):
    """Two candidates over the same models, one over models without a base, and a small tensor."""
    base, sources = make_models(size, dtype=dtype)
    small_base, small = make_models(5, 1, dtype)
    job = KernelJob(table, base, sources, torch.empty(size, dtype=dtype), **changes)
    return [
        job,
        KernelJob(Span((0.5, 0.5)), None, sources, torch.full_like(base, torch.nan)),
        KernelJob(SPAN, small_base, small, torch.full_like(small_base, torch.nan)),
        dataclasses.replace(job, table=Span((0.1, 0.2), 1.0, True), out_P=torch.zeros_like(base)),
        KernelJob(SPAN, small_base[:0], [each[:0] for each in small], small_base[:0].clone()),
    ]


def again(jobs):
    return [dataclasses.replace(j, out_P=torch.full_like(j.out_P, torch.nan)) for j in jobs]


def check(jobs, **settings):
    """Carry out jobs in one launch and streamed; returns the launches that it took."""
    launches = []

    def launch(jobs):
        launches.append(list(jobs))
        return reference.carry_out_all(jobs)

    wanted = reference.carry_out_all(jobs)
    repeated = again(jobs)
    assert streamed.carry_out_all(repeated, launch, **settings) == wanted
    for job, other in zip(jobs, repeated, strict=True):
        assert torch.equal(job.out_P.view(torch.uint8), other.out_P.view(torch.uint8))
    return launches


@pytest.mark.parametrize("scratch_bytes", [1, 50_000, 2**28])
@pytest.mark.parametrize("dither", [None, KEY], ids=["nearest", "dither"])
@pytest.mark.parametrize("name", TABLES)
def test_pieces_make_the_launch(name, dither, scratch_bytes):
    jobs = jobs_of(TABLES[name], dither=dither)
    launches = check(jobs, scratch_bytes=scratch_bytes, is_far=every)
    if scratch_bytes == 2**28:
        assert len(launches) == 1
    else:
        assert len(launches) > 2
        assert all(job.first % 8 == 0 for launch in launches for job in launch)


def test_runs_of_a_tensor_are_cut_further():
    base, sources = make_models(SIZE)
    jobs = [
        KernelJob(DELLA, base[a:b], [s[a:b] for s in sources], torch.empty_like(base[a:b]), first=a)
        for a, b in ((0, 8), (8, 20_000), (20_000, SIZE))
    ]
    assert len(check(jobs, scratch_bytes=30_000, is_far=every)) > 3


def test_whole_tensors_are_not_cut():
    base, sources = make_models(128 * 128, dtype=torch.float32)
    job = KernelJob(Whole(turned, (128, 128)), base, sources, torch.empty(128 * 128))
    other = dataclasses.replace(job, table=SPAN, out_P=torch.empty(128 * 128))
    launches = check([job, other], scratch_bytes=4096, is_far=every)
    assert [len(each.out_P) for each in launches[0]] == [128 * 128]
    assert len(launches) > 2


def test_what_is_not_finite_is_told_of_the_tensor():
    base, sources = make_models(SIZE)
    sources[1][SIZE - 1] = torch.inf
    jobs = [KernelJob(SPAN, base, sources, torch.empty_like(base))]
    (written,) = streamed.carry_out_all(jobs, reference.carry_out_all, 8192, every)
    assert not written.is_finite


def test_what_jobs_share_is_copied_once_and_only_what_is_far():
    base, sources = make_models(SIZE)
    jobs = [
        KernelJob(Span((weight, 0.5), 1.0, True), base, sources, torch.empty_like(base))
        for weight in (0.1, 0.2, 0.3)
    ]
    far = {sources[0].data_ptr(), sources[1].data_ptr()}
    launches = check(jobs, scratch_bytes=40_000, is_far=lambda t, _: t.data_ptr() in far)
    held = {base.untyped_storage().data_ptr(), *(s.untyped_storage().data_ptr() for s in sources)}
    scratch = set()
    for launch in launches:
        assert len(launch) == 3
        assert len({job.source_MP[0].data_ptr() for job in launch}) == 1
        for job in launch:
            assert job.base_P.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
            scratch |= {source.untyped_storage().data_ptr() for source in job.source_MP}
    assert len(scratch) == 2
    assert not scratch & held, "sources were not copied"


def test_ranks_are_copied_once_for_all_pieces_and_candidates():
    base, sources = make_models(SIZE)
    jobs = [
        KernelJob(dataclasses.replace(DELLA, lam=lam), base, sources, torch.empty_like(base))
        for lam in (0.5, 1.0)
    ]
    launches = check(jobs, scratch_bytes=60_000, is_far=every)
    assert len(launches) > 2
    places = {job.table.ranks[0].data_ptr() for launch in launches for job in launch}
    assert len(places) == 1
    assert DELLA.ranks[0].data_ptr() not in places


def test_the_next_pieces_are_copied_before_the_kernels_of_the_last():
    base, sources = make_models(SIZE)
    jobs = [KernelJob(SPAN, base, sources, torch.empty_like(base))]
    copied, seen = [], []

    def launch(jobs):
        # whoever overwrote the pieces that are in use would change the result
        seen.append(len(copied))
        return reference.carry_out_all(jobs)

    def is_far(tensor, device):
        copied.append(tensor)
        return True

    streamed.carry_out_all(jobs, launch, 30_000, is_far)
    planned = 3  # asked once for each model when the tensor is cut
    ahead = [(count - planned) // 3 for count in seen]
    last = len(seen)
    assert ahead == [min(i + 2, last) for i in range(last)]


def test_only_jobs_between_host_and_device_are_streamed():
    base, sources = make_models(16)
    on_meta = torch.empty(16, dtype=torch.bfloat16, device="meta")  # stands for any other device
    job = KernelJob(SPAN, base, sources, torch.empty_like(base))
    assert not streamed.can_run(job)
    assert streamed.can_run(dataclasses.replace(job, out_P=on_meta))
    there = KernelJob(SPAN, on_meta, [on_meta, on_meta], on_meta)
    assert not streamed.can_run(there)
    assert streamed.can_run(dataclasses.replace(there, base_P=base))
    with_ranks = dataclasses.replace(DELLA, ranks=ranks(16))
    assert streamed.can_run(dataclasses.replace(there, table=with_ranks))
    assert not streamed.can_run(dataclasses.replace(job, table=with_ranks))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", ["span", "mask", "della"])
def test_from_the_host_to_a_gpu(name, pinned):
    jobs = jobs_of(TABLES[name])
    wanted = reference.carry_out_all(jobs)
    pin = torch.Tensor.pin_memory if pinned else torch.Tensor.clone
    far = [
        dataclasses.replace(
            job,
            base_P=None if job.base_P is None else pin(job.base_P),
            source_MP=[pin(source) for source in job.source_MP],
            out_P=torch.full_like(job.out_P, torch.nan, device="cuda"),
        )
        for job in jobs
    ]
    assert streamed.carry_out_all(far, reference.carry_out_all, 50_000) == wanted
    for job, other in zip(jobs, far, strict=True):
        assert torch.equal(job.out_P.view(torch.uint8), other.out_P.cpu().view(torch.uint8))
