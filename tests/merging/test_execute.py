import math
import weakref

import pytest
import torch

from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.source import MemorySource
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import execute
from tests.merging.small import SHAPES, TASK_ARITHMETIC, make_sources, make_tensors, merged, plan_of

UP = "model.layers.1.mlp.up_proj.weight"
DARE = TASK_ARITHMETIC.replace("task_arithmetic", "dare_ties") + "parameters: {density: 0.5}\n"


def test_each_tensor_is_merged_with_its_own_values():
    text = TASK_ARITHMETIC.replace(
        "weight: 0.5", "weight: [{filter: mlp, value: [0, 1]}, {value: 0}]"
    )
    text = text.replace("weight: 0.25", "weight: 0.0")
    base, a = make_tensors(0), make_tensors(1)
    out = merged(text, make_sources())
    for name, shape in SHAPES.items():
        share = {"0": 0.0, "1": 0.5, "2": 1.0}[name.split(".")[2]] if "mlp" in name else 0.0
        assert out[name].shape == shape
        torch.testing.assert_close(
            out[name], base[name] + share * (a[name] - base[name]), rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("model", ["base", "a"])
def test_passthrough_carries_a_model_with_every_bit(model):
    sources = make_sources(torch.bfloat16)
    out = merged(f"merge_method: passthrough\nmodels: [model: {model}]", sources)
    assert digest_of(MemorySource(out)) == digest_of(sources[model])


def test_sources_are_not_written_to():
    sources = make_sources()
    before = [digest_of(source) for source in sources.values()]
    merged(DARE, sources)
    merged("merge_method: passthrough\nmodels: [model: a]", sources)["lm_head.weight"].zero_()
    assert [digest_of(source) for source in sources.values()] == before


class Noting(MemorySource):
    """Hands out copies, and knows which of them are still held by someone."""

    holds_tensors = False

    def __init__(self, source):
        super().__init__({name: source.read(name) for name in source.names()}, source.label)
        self.handed_out = []

    def read(self, name):
        copy = super().read(name).clone()
        self.handed_out.append(weakref.ref(copy))
        return copy

    @property
    def num_held(self):
        return sum(ref() is not None for ref in self.handed_out)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "model_stock", "passthrough"])
def test_nothing_read_is_held_while_a_tensor_is_with_the_consumer(method):
    text = TASK_ARITHMETIC.replace("task_arithmetic", method)
    if method == "passthrough":
        text = "merge_method: passthrough\nmodels: [{model: a}]"
    if method == "model_stock":
        text = text.replace(", parameters: {weight: 0.5}", "")
        text = text.replace(", parameters: {weight: 0.25}", "")
    sources = {name: Noting(source) for name, source in make_sources().items()}
    for _ in execute(plan_of(text, sources), sources, StatisticsCache()):
        assert [source.num_held for source in sources.values()] == [0, 0, 0]
    assert len(sources["a"].handed_out) == len(SHAPES)


def test_masks_depend_on_tensor_and_seed():
    base = make_tensors(0)
    kept = {}
    for seed in (0, 1):
        out = merged(DARE + f"evomerge: {{mask_seed: {seed}}}", make_sources())
        kept[seed] = {name: out[name] != base[name] for name in SHAPES}
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    assert not torch.equal(kept[0][names[0]], kept[0][names[1]])
    assert not torch.equal(kept[0][names[0]], kept[1][names[0]])


def test_non_contiguous_and_scalar_and_empty_tensors_are_merged():
    odd = {
        "model.layers.0.scalar": torch.tensor(2.0),
        "model.layers.0.empty": torch.zeros(0, 3),
        "lm_head.weight": make_tensors(0)["lm_head.weight"].T.contiguous().T,
    }
    other = {**odd, "model.layers.0.scalar": torch.tensor(4.0)}
    out = merged(TASK_ARITHMETIC, make_sources(base=odd, a=other, b=odd))
    assert out["model.layers.0.scalar"].item() == 3.0
    assert out["model.layers.0.empty"].shape == (0, 3)
    assert torch.equal(out["lm_head.weight"], make_tensors(0)["lm_head.weight"])


def test_integers_and_booleans_are_copied_when_they_agree():
    same = {
        "model.layers.0.mask": torch.tensor([True, False]),
        "model.layers.0.ids": torch.arange(4),
    }
    sources = make_sources(base=same, a=same, b=same)
    out = merged(TASK_ARITHMETIC + "out_dtype: bfloat16", sources)
    for name, tensor in same.items():
        assert torch.equal(out[name], tensor)
        assert out[name].dtype is tensor.dtype
        assert out[name].data_ptr() != tensor.data_ptr()
    differs = {**same, "model.layers.0.ids": torch.tensor([0, 1, 2, 4])}
    with pytest.raises(MergeError, match=r"^model\.layers\.0\.ids: .* of b and base differ\."):
        merged(TASK_ARITHMETIC, make_sources(base=same, a=same, b=differs))


@pytest.mark.parametrize("model", ["base", "a", "b"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_names_model_and_tensor(model, bad):
    tensor = make_tensors(1)[UP]
    tensor[3, 2] = bad
    with pytest.raises(NonFiniteError, match=rf"^{UP}: {model} holds NaN or Inf here\."):
        merged(TASK_ARITHMETIC, make_sources(**{model: {UP: tensor}}))


def test_a_merge_that_overflows_its_dtype_names_the_tensor():
    large = {UP: torch.full((10, 6), 300.0)}
    text = TASK_ARITHMETIC.replace("weight: 0.5", "weight: 500.0")
    sources = make_sources(a=large)
    assert merged(text, sources)[UP].max() > 1e5
    with pytest.raises(NonFiniteError, match=rf"^{UP}: the merge does not fit into float16\."):
        merged(text + "out_dtype: float16", sources)


def test_a_warm_cache_gives_the_same_bits():
    cache, sources = StatisticsCache(), make_sources(torch.bfloat16)
    for text in (DARE, TASK_ARITHMETIC, DARE.replace("dare_ties", "ties"), DARE):
        warm = merged(text, sources, cache)
        assert digest_of(MemorySource(warm)) == digest_of(MemorySource(merged(text, sources)))
