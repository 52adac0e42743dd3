"""Jobs on runs of a tensor, dither and cuts through ties, by the reference."""

import dataclasses
import itertools

import pytest
import torch

from evomerge.checksums import tensor_checksum
from evomerge.kernels import dispatch
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import DITHER, KEEP_ALL, MaskKey, random_words
from evomerge.kernels.reference import carry_out
from evomerge.kernels.tables import Mask, Span, TieCut

KEY = MaskKey(7, "model.layers.0.mlp.up_proj.weight")
NO_CUT = Mask((1.0,), (1.0,), (2.0,), (KEEP_ALL,), KEY)


def make_models(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator)
    sources = [base + 0.01 * torch.randn(size, generator=generator) for _ in range(2)]
    return base.bfloat16(), [source.bfloat16() for source in sources]


@pytest.mark.parametrize("dither", [None, KEY])
@pytest.mark.parametrize(
    "table",
    [
        Span((0.3, 0.9), 1.0, True),
        Mask((0.5, 0.7), (0.5, 0.7), (0.002, 0.0), (KEEP_ALL, 2**31), KEY, elect=True),
    ],
)
def test_runs_of_a_tensor_make_the_tensor(table, dither):
    base, sources = make_models(100_003)
    whole, parts = torch.empty_like(base), torch.full_like(base, torch.nan)
    jobs = [KernelJob(table, base, sources, whole, dither)]
    cuts = [0, 8, 40_000, 90_008, len(base)]
    for start, stop in itertools.pairwise(cuts):
        run = [source[start:stop] for source in sources]
        job = KernelJob(table, base[start:stop], run, parts[start:stop], dither, first=start)
        jobs.append(job)
    (written, *of_parts), ran = dispatch.carry_out_all(jobs)
    assert torch.equal(whole, parts)
    assert written.checksum == tensor_checksum(whole)
    assert sum(part.checksum for part in of_parts) % 2**64 == written.checksum
    assert all(each.is_finite for each in (written, *of_parts))
    assert ran


def test_what_is_not_finite_is_told():
    base = torch.tensor([1.0, 3e38])
    out = torch.empty(2)
    (written,), _ = dispatch.carry_out_all([KernelJob(Span((10.0,)), None, [base], out)])
    assert not written.is_finite


def test_dither_rounds_by_the_bits_that_go():
    # 1 + k * 2**-16 lies k / 512 of the way from 1 to the next bfloat16, 1 + 2**-7
    merged = 1.0 + torch.arange(2**14) % 512 * 2.0**-16
    out = torch.empty(len(merged), dtype=torch.bfloat16)
    carry_out(Span((1.0,)), None, [merged], out, dither=KEY)
    word = random_words(KEY, DITHER, 0, len(merged))[0] % 2**16
    up = (torch.arange(2**14) % 512) * 2**7 + word >= 2**16
    assert torch.equal(out.float(), 1.0 + up * 2.0**-7)
    # the mean of 2**14 choices, each off by at most 2**-8 on the root of the mean square
    assert abs(out.double().mean() - merged.double().mean()) < 4 * 2.0**-8 / 2**7


def test_dither_keeps_what_bfloat16_holds():
    base, _ = make_models(1000)
    out = torch.empty_like(base)
    carry_out(Span((-1.0,)), None, [base], out, dither=KEY)
    assert torch.equal(out, -base)


def test_ties_are_cut_by_index_and_by_chance():
    base = torch.zeros(4096)
    source = torch.tensor([2.0, -3.0, 1.0, 2.0]).repeat(1024)
    ties = source == 2.0

    def merged(cut):
        out = torch.empty(4096)
        carry_out(dataclasses.replace(NO_CUT, tie_cuts=(cut,)), base, [source], out, chunk=1000)
        return out

    always = torch.where(source == -3.0, source, 0.0)
    below = torch.arange(4096) < 2001
    assert torch.equal(merged(None), torch.where(ties, source, always))
    assert torch.equal(merged(TieCut(2.5, end=2001)), torch.where(ties & below, source, always))
    lucky = random_words(KEY, 0, 0, 4096)[0] < 2**30
    assert torch.equal(merged(TieCut(2.5, level=2**30)), torch.where(ties & lucky, source, always))
    assert torch.equal(merged(TieCut(2.5, level=0)), always)
