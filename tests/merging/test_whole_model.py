"""Methods that look at all tensors of a model together."""

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import merged_tensors
from tests.merging.small import make_sources, make_tensors, merged, plan_of

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0, density: 0.3}}
parameters: {trim_whole_model: true}
"""
NORM = "model.norm.weight"


def scaled(factor):
    """Model `a` with a norm that differs more from the base than anything else."""
    base, a = make_tensors(0), make_tensors(1)
    return {"a": {NORM: base[NORM] + factor * (a[NORM] - base[NORM])}}


def test_trimming_takes_the_largest_of_the_whole_model():
    sources = make_sources(**scaled(1000.0))
    out = merged(TIES, sources)
    deltas = {
        name: sources["a"].read(name) - sources["base"].read(name) for name in sources["a"].names()
    }
    every = torch.cat([delta.reshape(-1) for delta in deltas.values()]).abs()
    threshold = every.sort(descending=True).values[int(0.3 * len(every)) - 1]
    for name, delta in deltas.items():
        kept = torch.where(delta.abs() >= threshold, delta, 0.0)
        assert torch.equal(out[name], sources["base"].read(name) + kept)
    assert torch.equal(out[NORM], sources["base"].read(NORM) + deltas[NORM])  # all of it
    each = merged(TIES.replace("true", "false"), sources)
    assert not torch.equal(each[NORM], out[NORM])


def test_a_part_of_a_merge_is_what_the_whole_is():
    sources = make_sources(torch.bfloat16, **scaled(3.0))
    plan, whole = plan_of(TIES, sources), merged(TIES, sources)
    part = merged_tensors(plan, sources, StatisticsCache(), only={NORM})
    assert list(part) == [NORM]
    assert torch.equal(part[NORM], whole[NORM])


def test_slices_of_other_models_have_no_whole():
    text = """
merge_method: ties
base_model: base
slices:
  - sources: [{model: a, layer_range: [0, 1]}, {model: base, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 3]}, {model: base, layer_range: [1, 3]}]
parameters: {weight: 1.0, density: 0.3, trim_whole_model: true}
"""
    with pytest.raises(MergeError, match="Merge the same models in every slice"):
        merged(text, make_sources())
