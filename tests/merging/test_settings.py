"""Settings of a recipe for the whole merge: elements that tie at a threshold, and rounding."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import parse_recipe, write_recipe
from evomerge.errors import MergeError
from evomerge.kernels import dispatch
from evomerge.kernels.launch import KernelJob
from evomerge.kernels.masks import DITHER, MaskKey, random_words
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.execute import Merger, execute
from evomerge.merging.live import write_live
from tests.merging.small import TASK_ARITHMETIC, make_sources, make_tensors, merged, plan_of
from tests.merging.test_live import Net

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
SIZE = 40_000
ONE_TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0, density: 0.39}}
"""
DENSITY = 0.39
TWO_TIES = ONE_TIES + "  - {model: b, parameters: {weight: 0.4, density: 0.5}}\n"
SUM = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.45}}
"""
SETTINGS = ["threshold_ties: index", "threshold_ties: hash", "rounding: dither"]


def with_settings(text, *settings):
    return f"{text}\nevomerge: {{{', '.join(settings)}}}\n"


def near_sources(distance):
    """Models with one tensor of 40 000 elements in bfloat16, so near that many deltas tie."""
    generator = torch.Generator().manual_seed(3)
    base = (torch.randn(200, 200, generator=generator) * 0.02).bfloat16()
    tensors = {"base": base}
    for label in "ab":
        noise = distance * torch.randn(200, 200, generator=generator)
        tensors[label] = (base.float() + noise).bfloat16()
    return {label: MemorySource({NAME: tensor}, label) for label, tensor in tensors.items()}


def deltas(sources):
    return {k: sources[k].read(NAME).double() - sources["base"].read(NAME).double() for k in "ab"}


def digest(text, sources):
    return digest_of(MemorySource(merged(text, sources)))


def test_a_recipe_says_which_of_the_elements_that_tie_are_kept():
    sources = near_sources(1e-4)
    wide = f"{ONE_TIES}out_dtype: float32"  # so that no small delta is rounded away
    base, delta = sources["base"].read(NAME).double(), deltas(sources)["a"].reshape(-1)
    changed = {}
    for policy in ("keep", "index", "hash"):
        out = merged(with_settings(wide, f"threshold_ties: {policy}"), sources)[NAME]
        changed[policy] = (out.double() != base).reshape(-1)
    order = np.argsort(-delta.float().abs().bfloat16().float().numpy(), kind="stable")
    exactly = np.zeros(SIZE, dtype=bool)
    exactly[order[: int(DENSITY * SIZE)]] = True
    assert np.array_equal(changed["index"].numpy(), exactly)
    assert changed["keep"].sum() > (DENSITY + 0.02) * SIZE
    assert bool((changed["hash"] <= changed["keep"]).all())
    assert bool((changed["hash"] != changed["index"]).any())
    plain = merged(wide, sources)[NAME]
    assert torch.equal(plain, merged(with_settings(wide, "threshold_ties: keep"), sources)[NAME])


def test_one_cache_serves_recipes_of_every_setting():
    sources, cache = near_sources(1e-4), StatisticsCache()
    texts = [with_settings(f"{ONE_TIES}parameters: {{rescale: true}}", each) for each in SETTINGS]
    for text in [ONE_TIES, *texts, *reversed(texts)]:
        assert torch.equal(merged(text, sources, cache)[NAME], merged(text, sources)[NAME])


def test_the_mask_seed_decides_what_is_drawn():
    sources = near_sources(1e-4)
    for setting, matters in zip(SETTINGS, (False, True, True), strict=True):
        text = SUM if "rounding" in setting else ONE_TIES
        first, other = (
            digest(with_settings(text, setting, f"mask_seed: {seed}"), sources) for seed in (1, 2)
        )
        assert (first != other) is matters, setting


def gain_of(realised, ideal):
    """How much of the ideal change the realised one is, along it."""
    return float((realised * ideal).sum() / (ideal * ideal).sum())


def test_dither_keeps_small_merges_at_their_size():
    """At a thousandth of the weights' size, rounding to nearest loses much of a merge."""
    sources = near_sources(2e-5)
    base, of = sources["base"].read(NAME).double(), deltas(sources)
    ideal = 0.3 * of["a"] + 0.45 * of["b"]
    gains = {}
    for rounding in ("nearest", "dither"):
        out = merged(with_settings(SUM, f"rounding: {rounding}"), sources)[NAME]
        assert out.dtype is torch.bfloat16
        gains[rounding] = gain_of(out.double() - base, ideal)
    # each element goes up or down by a throw of its own, whose mean is the ideal number
    wanted = base + ideal
    ulp = 2.0 ** (torch.frexp(wanted.abs())[1].double() - 8)
    share = wanted / ulp - torch.floor(wanted / ulp)
    variance = (ideal**2 * share * (1 - share) * ulp**2).sum()
    deviation = float(variance.sqrt() / (ideal * ideal).sum())
    assert deviation < 0.02
    assert abs(gains["dither"] - 1) < 5 * deviation
    assert gains["nearest"] < 0.85


def test_dither_rounds_by_the_numbers_of_seed_and_tensor():
    sources = near_sources(1e-3)
    out = merged(with_settings(SUM, "rounding: dither", "mask_seed: 9"), sources)[NAME]
    precise = merged(f"{SUM}out_dtype: float32", sources)[NAME]
    word = random_words(MaskKey(9, NAME), DITHER, 0, SIZE)[0].numpy().reshape(200, 200)
    bits = precise.numpy().view(np.uint32).astype(np.int64) + word % 2**16
    wanted = (bits >> 16 << 16).astype(np.uint32).view(np.float32)
    assert np.array_equal(out.float().numpy(), wanted)
    assert not torch.equal(out, precise.bfloat16())


def test_what_is_not_rounded_stays_exact_under_dither():
    base, a, b = (make_tensors(seed)[NORM] for seed in (0, 1, 2))
    wide = {"base": {NORM: base}, "a": {NORM: a}, "b": {NORM: b}}
    sources = make_sources(torch.bfloat16, **wide)
    plain, dithered = merged(SUM, sources), merged(with_settings(SUM, "rounding: dither"), sources)
    assert dithered[NORM].dtype is torch.float32
    assert torch.equal(dithered[NORM], plain[NORM])
    changed = [name for name in plain if not torch.equal(plain[name], dithered[name])]
    assert len(changed) > 5
    # where nothing has to be rounded, dither changes nothing either
    text = with_settings("merge_method: passthrough\nmodels: [model: a]", "rounding: dither")
    assert digest(text, sources) == digest_of(sources["a"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_live_model_gets_the_same(setting):
    sources = near_sources(1e-4)
    plain = SUM if "rounding" in setting else ONE_TIES
    text = with_settings(plain, setting, "mask_seed: 3")
    model = Net({NAME: torch.zeros(200, 200)}, dtype=torch.bfloat16)
    live = write_live(plan_of(text, sources), sources, StatisticsCache(), model)
    assert live == digest(text, sources) != digest(plain, sources)
    assert torch.equal(model.get_parameter(NAME), merged(text, sources)[NAME])


@pytest.mark.parametrize("setting", SETTINGS)
def test_runs_of_a_tensor_make_the_same_tensor(setting):
    sources = near_sources(1e-4)
    text = with_settings(SUM if "rounding" in setting else ONE_TIES, setting)
    job = kernel_job(text, sources)
    whole, parts = job.out_P, torch.full_like(job.out_P, math.nan)
    jobs = [job]
    for start in range(0, SIZE, 12_008):
        run = slice(start, min(start + 12_008, SIZE))
        source_MP = [source_P[run] for source_P in job.source_MP]
        jobs.append(KernelJob(job.table, job.base_P[run], source_MP, parts[run], job.dither, start))
    dispatch.carry_out_all(jobs)
    assert torch.equal(whole, parts)
    assert torch.equal(whole.view(200, 200), merged(text, sources)[NAME])


def kernel_job(text, sources):
    """The job that a merge of one tensor puts into its launch, its output as NaN."""
    taken = []

    def take(jobs):
        taken.extend(jobs)
        return run(jobs)

    with pytest.MonkeyPatch.context() as patch:
        run = dispatch.carry_out_all
        patch.setattr(dispatch, "carry_out_all", take)
        list(execute(plan_of(text, sources), sources, StatisticsCache()))
    (job,) = taken
    job.out_P.fill_(math.nan)
    return job


CHILD = """
import sys
import torch
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.source import MemorySource
from tests.merging.small import merged
text, tensors = torch.load(sys.argv[1])
sources = {label: MemorySource(tensors[label], label) for label in tensors}
print(digest_of(MemorySource(merged(text, sources))))
"""


def test_another_process_draws_the_same(tmp_path):
    sources = near_sources(1e-4)
    text = with_settings(TWO_TIES, "threshold_ties: hash", "rounding: dither", "mask_seed: 3")
    tensors = {label: {NAME: source.read(NAME)} for label, source in sources.items()}
    torch.save((text, tensors), tmp_path / "merge.pt")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "merge.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(text, sources)


def test_a_recipe_with_settings_is_read_back_and_has_its_own_hash():
    plain = parse_recipe(ONE_TIES)
    hashes = {plain.hash}
    for setting in SETTINGS:
        recipe = parse_recipe(with_settings(ONE_TIES, setting, "mask_seed: 4"))
        assert parse_recipe(write_recipe(recipe)) == recipe
        hashes.add(recipe.hash)
    assert len(hashes) == 4
    said = parse_recipe(with_settings(ONE_TIES, "threshold_ties: keep", "rounding: nearest"))
    assert said.hash == plain.hash


def refusal(text, sources):
    with pytest.raises(MergeError) as caught:
        plan_of(text, sources)
    return str(caught.value)


def test_ties_without_a_threshold_are_refused():
    text = with_settings(TASK_ARITHMETIC, "threshold_ties: index")
    assert refusal(text, make_sources()) == (
        "evomerge.threshold_ties: came index, and task_arithmetic keeps no elements down to a "
        "threshold. Remove it, or take ties or breadcrumbs."
    )


def test_ties_of_the_whole_model_are_refused():
    text = with_settings(
        f"{ONE_TIES}parameters: {{trim_whole_model: true}}", "threshold_ties: hash"
    )
    assert refusal(text, make_sources()) == (
        "lm_head.weight: evomerge.threshold_ties: came hash, which counts within a tensor, and "
        "trim_whole_model is set. Remove one of the two."
    )


@pytest.mark.parametrize("written", ["float16", "float32"])
def test_dither_of_another_dtype_is_refused(written):
    text = with_settings(f"{TASK_ARITHMETIC}out_dtype: {written}", "rounding: dither")
    assert refusal(text, make_sources(torch.bfloat16)) == (
        "evomerge.rounding: came dither, which is for bfloat16, and tensors of this merge are "
        f"written as {written}. Set out_dtype: bfloat16, or remove it."
    )


def test_dither_beside_one_float16_tensor_is_refused():
    half = {NORM: make_tensors(0)[NORM].half()}
    text = with_settings(TASK_ARITHMETIC, "rounding: dither")
    assert "are written as float16." in refusal(text, make_sources(torch.bfloat16, base=half))


def test_one_merger_serves_recipes_of_every_setting():
    """A worker keeps the facts about tensors that it holds; they must not be another policy's."""
    sources = near_sources(1e-4)
    merger = Merger(sources, StatisticsCache())
    for setting in ("threshold_ties: keep", *SETTINGS, "threshold_ties: index"):
        text = with_settings(TWO_TIES, setting)
        (one,) = merger.execute(plan_of(text, sources))
        assert torch.equal(one.tensor, merged(text, sources)[NAME]), setting
