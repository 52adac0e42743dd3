"""Which jobs the Triton kernels take, and which of them go together."""

import dataclasses

import pytest
import torch

from evomerge.kernels import triton_launch
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import KEEP_ALL, MaskKey
from evomerge.kernels.tables import Local, Mask, Span, Whole
from evomerge.kernels.triton_pack import batches, can_pack

KEY = MaskKey(7, "a.weight")
BASE = torch.zeros(64, dtype=torch.bfloat16)
SOURCES = [torch.ones(64, dtype=torch.bfloat16) for _ in range(3)]
SPAN = Span((0.1, 0.2, 0.3), 1.0, True)
DARE = Mask((1.0,) * 3, (1.0,) * 3, (0.0,) * 3, (2**31,) * 3, KEY)
RANKS = tuple(torch.zeros(64, dtype=torch.uint8) for _ in range(3))


def job(table, **changes):
    made = KernelJob(table, BASE, SOURCES, torch.empty_like(BASE))
    return dataclasses.replace(made, **changes)


def sources_of(number):
    return {"source_MP": SOURCES[:1] * number}


@pytest.mark.parametrize(
    "taken",
    [
        job(SPAN),
        job(SPAN, base_P=None),
        job(DARE, first=2**32),
        job(Span((1.0,) * 8), **sources_of(8)),
        job(dataclasses.replace(DARE, rank_steps=(2**20,) * 3, ranks=RANKS)),
        # a step that never counts needs no ranks
        job(dataclasses.replace(DARE, keep_levels=(KEEP_ALL,) * 3, rank_steps=(1,) * 3)),
    ],
)
def test_jobs_that_are_taken(taken):
    assert can_pack(taken)
    assert not triton_launch.can_run(taken), "none of it lies on a GPU"


@pytest.mark.parametrize(
    "refused",
    [
        pytest.param(job(Whole(torch.add, (8, 8))), id="whole tensors"),
        pytest.param(job(Local(torch.add)), id="an expression without a name"),
        pytest.param(job(DARE, base_P=None), id="a mask without a base"),
        pytest.param(job(Span((1.0,) * 9), **sources_of(9)), id="nine models"),
        pytest.param(job(SPAN, out_P=torch.empty(65, dtype=torch.bfloat16)[1:]), id="odd address"),
        pytest.param(job(SPAN, out_P=torch.empty(64, dtype=torch.float64)), id="float64"),
        pytest.param(job(SPAN, out_P=torch.empty(72, dtype=torch.bfloat16)), id="two sizes"),
        pytest.param(job(Span((1.0,) * 2)), id="too few coefficients"),
        pytest.param(job(SPAN, source_MP=[*SOURCES[:2], BASE.float()]), id="two dtypes"),
        pytest.param(job(SPAN, source_MP=[*SOURCES[:2], BASE.to("meta")]), id="two devices"),
        pytest.param(job(SPAN, first=2**32 - 8), id="an index that carries inside a block"),
        pytest.param(
            job(dataclasses.replace(DARE, rank_steps=(2**24,) * 3, ranks=RANKS)),
            id="levels above all numbers",
        ),
        pytest.param(
            job(dataclasses.replace(DARE, rank_steps=(2**20,) * 3, ranks=RANKS), first=8),
            id="too few ranks",
        ),
    ],
)
def test_jobs_that_are_left_to_others(refused):
    assert not can_pack(refused)


def test_one_read_of_the_sources_does_a_population():
    jobs = [job(SPAN) for _ in range(13)]
    other = KernelJob(SPAN, BASE, [BASE, *SOURCES[1:]], torch.empty_like(BASE))
    jobs.insert(5, other)
    elected = dataclasses.replace(DARE, elect=True)
    jobs += [job(DARE), job(elected), job(DARE), job(elected)]
    assert [places for places in batches(jobs) if len(places) > 1] == [
        [0, 1, 2, 3, 4, 6, 7, 8],
        [9, 10, 11, 12],
        [14, 16],
    ]
    assert sorted(place for places in batches(jobs) for place in places) == list(range(18))


def test_masks_of_different_seeds_do_not_share_their_random_numbers():
    other = dataclasses.replace(DARE, key=MaskKey(8, KEY.tensor))
    assert list(batches([job(DARE), job(other)])) == [[0], [1]]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    assert triton_launch.missing() == "triton is not installed. pip install 'evomerge[gpu]'"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if triton_launch.importlib.util.find_spec("triton"):
        assert triton_launch.missing() == "torch finds no CUDA device"
