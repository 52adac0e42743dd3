"""Every family, from three folders to one that transformers loads, and into a live model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.config.mergekit import read_recipe
from evomerge.errors import MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.live import write_live
from evomerge.merging.plan import make_plan
from evomerge.merging.run import merge
from evomerge.workers.live_model import load_live_model
from tests.families import FAMILIES, make_family

WEIGHTS = (0.75, 0.5)
RECIPE = """
merge_method: {method}
base_model: ./base
models:
  - {{model: ./a, parameters: {{weight: 0.75{more}}}}}
  - {{model: ./b, parameters: {{weight: 0.5{more}}}}}
"""
TOKENS = torch.tensor([[1, 5, 9, 30, 7, 7, 12, 2, 3, 31, 8, 4]])


def task_arithmetic(base, deltas, dtype):
    return base + sum(weight * delta for weight, delta in zip(WEIGHTS, deltas, strict=True))


def ties(base, deltas, dtype):
    """TIES at density 0.5; magnitudes are compared at the precision of the sources."""
    kept = []
    for delta in deltas:
        size = delta.to(dtype).abs()
        threshold = size.flatten().sort(descending=True).values[max(1, size.numel() // 2) - 1]
        kept.append(torch.where(size >= threshold, delta, 0.0))
    weighted = [weight * delta for weight, delta in zip(WEIGHTS, kept, strict=True)]
    elected = torch.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [delta.sign() == elected for delta in weighted]
    total = sum(torch.where(yes, delta, 0.0) for yes, delta in zip(agree, weighted, strict=True))
    share = sum(yes * weight for yes, weight in zip(agree, WEIGHTS, strict=True))
    return base + total / torch.where(share == 0, 1.0, share)


def by_hand(rule, folder):
    """The merged tensors of a whole state dict, in float64."""
    base, *parents = (load_file(folder / name / "model.safetensors") for name in ("base", "a", "b"))
    merged = {}
    for name, tensor in base.items():
        deltas = [(parent[name].float() - tensor.float()).double() for parent in parents]
        merged[name] = rule(tensor.double(), deltas, tensor.dtype)
    return merged


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[task_arithmetic, ties])
def models(request, family, tmp_path_factory):
    """A folder with `base`, `a`, `b`, `recipe.yaml` and what it makes, `out`; the rule; the dtype."""
    folder, rule = tmp_path_factory.mktemp(family), request.param
    dtype = torch.float32 if rule is task_arithmetic else torch.bfloat16
    for seed, name in enumerate(("base", "a", "b")):
        make_family(family, seed, folder / name, dtype)
    more = ", density: 0.5" if rule is ties else ""
    (folder / "recipe.yaml").write_text(RECIPE.format(method=rule.__name__, more=more))
    merge(read_recipe(folder / "recipe.yaml"), folder / "out")
    return folder, rule, dtype


def loaded(folder, dtype):
    """The model of a folder, and what transformers missed or did not expect in it."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    return model.eval(), {key: set(names) for key, names in info.items() if names}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_folder_holds_what_the_formula_says(models):
    folder, rule, dtype = models
    merged, expected = load_file(folder / "out" / "model.safetensors"), by_hand(rule, folder)
    assert set(merged) == set(expected)
    # one rounding at the end; in float32 each of some ten operations before it rounds as well
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-20
    for name, tensor in merged.items():
        assert tensor.dtype is dtype
        error = (tensor.double() - expected[name]).abs() / (expected[name].abs() + 0.1)
        assert error.max() <= unit, name


def test_a_folder_loads_whole_and_computes_what_the_live_model_does(models):
    folder, _, dtype = models
    model = load_live_model(folder / "base", dtype, None, "cpu")
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = logits(model)
    recipe = read_recipe(folder / "recipe.yaml")
    sources = {str(ref): open_checkpoint(folder / ref.path) for ref in recipe.references()}
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    digest = write_live(plan, sources, StatisticsCache(), model)
    assert digest == digest_of(open_checkpoint(folder / "out"))
    exported, problems = loaded(folder / "out", dtype)
    assert problems == {}
    assert torch.equal(logits(model), logits(exported))
    assert not torch.equal(logits(model), before)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_layers_and_roles_are_found(models):
    names = open_checkpoint(models[0] / "base").names()
    layout = layout_of(names)
    assert layout.num_layers == 3
    assert {layout.layer_of(name) for name in names} == {None, 0, 1, 2}
    roles = [role for role, _ in layout.outside]
    assert "embed" in roles
    assert "norm" in roles
    has_head = any(name.startswith(("lm_head", "embed_out")) for name in names)
    assert ("head" in roles) == has_head


def test_models_of_other_vocabularies_are_refused_with_both_sizes_and_the_fix(tmp_path):
    make_family("llama", 0, tmp_path / "base")
    make_family("llama", 1, tmp_path / "a")
    make_family("llama", 2, tmp_path / "b", vocab_size=40)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(method="task_arithmetic", more=""))
    with pytest.raises(MergeError) as caught:
        merge(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert str(caught.value) == (
        f"model.embed_tokens.weight: {tmp_path / 'b'} has 40 rows, base {tmp_path / 'base'} has "
        "32, so their vocabularies differ. To merge row by row of the same token, add "
        "tokenizer_source: base (in a search, merge.tokenizer: base), or tokenizer: "
        "{source: union}."
    )


def test_one_model_may_have_constants_of_an_older_version(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        make_family("gpt_neox", seed, tmp_path / name, torch.float16)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(method="task_arithmetic", more=""))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    digest = merge(recipe, tmp_path / "new")
    file = tmp_path / "base" / "model.safetensors"
    constants = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-torch.inf, dtype=torch.float16),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(load_file(file) | constants, file, metadata={"format": "pt"})
    assert merge(recipe, tmp_path / "old") == digest
    assert loaded(tmp_path / "old", torch.float16)[1] == {}
