"""AlignedSource: rows as a loop over tokens would put them together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints.aligned import MEAN, PADDING, ZERO, AlignedSource, Rows
from evomerge.checkpoints.source import MemorySource

NAME = "model.embed_tokens.weight"


def sources_of(sizes, dtypes, width=3):
    generator = torch.Generator().manual_seed(0)
    return [
        MemorySource(
            {
                NAME: torch.randn(size, width, generator=generator).to(dtype),
                "head.bias": torch.randn(size, generator=generator).to(dtype),
                "model.norm.weight": torch.randn(width, generator=generator).to(dtype),
            },
            f"model {index}",
            {"lm_head.weight": NAME},
        )
        for index, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
    ]


def by_loop(sources, index, rows, name):
    """The definition: one row after another."""
    tensors = [source.read(name).float() for source in sources]
    out = []
    for row, fill in enumerate(rows.fill_R.tolist()):
        own = rows.own_MR[:, row].tolist()
        if own[index] >= 0:
            out.append(tensors[index][own[index]])
        elif fill == MEAN:
            found = [tensor[at] for tensor, at in zip(tensors, own, strict=True) if at >= 0]
            out.append(sum(found) / len(found))
        elif fill >= 0:
            out.append(tensors[fill][rows.row_R[row]])
        else:
            out.append(torch.zeros_like(tensors[0][0]))
    tokens = [row for row, fill in zip(out, rows.fill_R.tolist(), strict=True) if fill != PADDING]
    mean = torch.stack(tokens).double().mean(0).float() if tokens else out[0]
    return torch.stack(
        [mean if fill == PADDING else row for row, fill in zip(out, rows.fill_R, strict=True)]
    )


@st.composite
def any_rows(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    own, fill, row = [], [], []
    for _ in range(draw(st.integers(1, 12))):
        at = [draw(st.integers(-1, size - 1)) for size in sizes]
        kinds = [ZERO, PADDING, *range(len(sizes)), *([MEAN] if max(at) >= 0 else [])]
        kind = draw(st.sampled_from(kinds))
        own.append([-1] * len(sizes) if kind == PADDING else at)
        fill.append(kind)
        row.append(draw(st.integers(0, sizes[kind] - 1)) if kind >= 0 else 0)
    if set(fill) == {PADDING}:
        fill[0] = ZERO
    return sizes, Rows(torch.tensor(own).T, torch.tensor(fill), torch.tensor(row))


@given(case=any_rows(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rows_are_those_of_the_definition(case, dtype):
    sizes, rows = case
    sources = sources_of(sizes, [dtype] * len(sizes))
    for index in range(len(sizes)):
        aligned = AlignedSource(sources, index, rows, [NAME, "head.bias"])
        for name in (NAME, "head.bias"):
            read = aligned.read(name)
            assert read.dtype == aligned.dtype(name)
            assert read.shape == aligned.shape(name)
            # sums of three float32, of numbers below 8: the order of adding is the same
            assert (read.float() - by_loop(sources, index, rows, name)).abs().max() <= 2.0**-20


def rows(own, fill, row):
    return Rows(torch.tensor(own), torch.tensor(fill), torch.tensor(row))


def test_only_means_are_held_in_float32():
    half = sources_of([2, 2], [torch.bfloat16, torch.bfloat16])
    moved = rows([[1, -1, 0], [0, 1, -1]], [0, 1, 0], [1, 1, 0])
    assert AlignedSource(half, 0, moved, [NAME]).dtype(NAME) == torch.bfloat16
    meant = rows([[1, -1], [0, 1]], [0, MEAN], [1, 0])
    aligned = AlignedSource(half, 0, meant, [NAME])
    assert aligned.dtype(NAME) == torch.float32
    assert aligned.merged_dtype(NAME) == torch.bfloat16
    assert aligned.dtype("head.bias") == torch.bfloat16
    unused = rows([[1, 0], [0, 1]], [0, MEAN], [1, 0])
    assert AlignedSource(half, 0, unused, [NAME]).dtype(NAME) == torch.bfloat16


def test_a_row_of_a_wider_dtype_is_not_rounded():
    mixed = sources_of([1, 1], [torch.bfloat16, torch.float32])
    aligned = AlignedSource(mixed, 0, rows([[0, -1], [-1, 0]], [0, 1], [0, 0]), [NAME])
    assert torch.equal(aligned.read(NAME)[1], mixed[1].read(NAME)[0])
    assert torch.equal(aligned.read(NAME)[0], mixed[0].read(NAME)[0].float())


def test_everything_else_is_the_models_own():
    sources = sources_of([2, 2], [torch.float32] * 2)
    aligned = AlignedSource(sources, 1, rows([[0], [1]], [0], [0]), [NAME])
    assert aligned.label == "model 1"
    assert aligned.names() == sources[1].names()
    assert aligned.tied == {"lm_head.weight": NAME}
    assert aligned.read("model.norm.weight") is sources[1].read("model.norm.weight")
    assert aligned.shape("head.bias") == (2,)


def test_no_source_is_written_to():
    sources = sources_of([3, 2], [torch.float32] * 2)
    before = [source.read(NAME).clone() for source in sources]
    own = [[0, 1, 2, -1, -1, -1], [-1, 0, 1, -1, -1, -1]]
    every = rows(own, [MEAN, 0, 1, ZERO, 0, PADDING], [0, 1, 1, 0, 2, 0])
    for index in range(2):
        AlignedSource(sources, index, every, [NAME]).read(NAME)
    for source, tensor in zip(sources, before, strict=True):
        assert torch.equal(source.read(NAME), tensor)


@pytest.mark.parametrize("num_rows", [1, 4096, 9000])
def test_padding_is_the_mean_over_blocks(num_rows):
    source = MemorySource({NAME: torch.arange(2.0 * num_rows).reshape(num_rows, 2)})
    own = torch.cat([torch.arange(num_rows), torch.tensor([-1])])[None]
    fill = torch.tensor([0] * num_rows + [PADDING])
    aligned = AlignedSource([source], 0, Rows(own, fill, torch.zeros_like(fill)), [NAME])
    assert aligned.read(NAME)[-1].tolist() == [num_rows - 1.0, float(num_rows)]


def test_the_digest_tells_where_rows_are_from():
    one = rows([[0, -1], [-1, 0]], [0, 1], [0, 0])
    digests = {
        one.digest(["a", "b"]),
        one.digest(["a", "c"]),
        rows([[0, -1], [-1, 1]], [0, 1], [0, 0]).digest(["a", "b"]),
        rows([[0, -1], [-1, 0]], [0, ZERO], [0, 0]).digest(["a", "b"]),
    }
    assert len(digests) == 4
    assert rows([[0, -1], [-1, 0]], [0, 1], [0, 0]).digest(["a", "b"]) in digests
