"""Layers of models stacked: what each tensor is made of, with which values, and what loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.depth import with_depth
from evomerge.checkpoints.fingerprint import digest_of
from evomerge.checkpoints.index import read_json
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.checkpoints.source import MemorySource
from evomerge.config.mergekit import parse_recipe, read_recipe
from evomerge.errors import MergeError, NonFiniteError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.live import write_live
from evomerge.merging.parts import output_depth
from evomerge.merging.plan import make_plan
from evomerge.merging.run import merge
from evomerge.workers.live_model import load_live_model
from tests.merging.small import make_sources, make_tensors, merged, plan_of
from tests.tiny import make_model, make_tokenizer

UP = "model.layers.{}.mlp.up_proj.weight"
STACK = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
"""
# outputs 0 and 1 merge a's layers 1 and 2 over the base's 0 and 1; output 2 is between b and a
TIES = """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [1, 3], parameters: {weight: [{filter: layers.2, value: 0.5}]}}
    parameters: {density: [0.25, 0.75], lambda: [{filter: layers.0, value: 0.5}]}
  - sources:
      - {model: b, layer_range: [0, 1], parameters: {weight: [0.125, 0.375]}}
      - {model: a, layer_range: [2, 3], parameters: {weight: [0.625, 0.875]}}
    base_model: b
parameters: {weight: 1.0, density: 0.5, lambda: 0.75}
"""


def without_base_parameters(text):
    return text.replace(", parameters: {weight: [0.125, 0.375]}", "")


def job(plan, name):
    return next(job for job in plan.jobs if job.spec.name == name)


def problem(text, sources=None):
    with pytest.raises(MergeError) as caught:
        plan_of(text, sources or make_sources())
    return str(caught.value)


def test_stacked_tensors_are_their_models_own():
    out = merged(STACK, make_sources())
    a, b = make_tensors(1), make_tensors(2)
    assert sorted(out) == sorted(
        [UP.format(i) for i in range(4)]
        + [f"model.layers.{i}.input_layernorm.weight" for i in range(4)]
        + ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    )
    for place, (model, layer) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        for name in ("mlp.up_proj", "input_layernorm"):
            key = f"model.layers.{{}}.{name}.weight"
            assert torch.equal(out[key.format(place)], model[key.format(layer)])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(out[name], b[name])


def test_a_slice_scales_one_model_by_the_name_of_what_it_gives():
    text = STACK.replace(
        "layer_range: [1, 3]",
        "layer_range: [1, 3], parameters: {scale: [{filter: layers.1.mlp, value: 0.5}]}",
    )
    out, b = merged(text, make_sources()), make_tensors(2)
    assert torch.equal(out[UP.format(2)], b[UP.format(1)] * 0.5)
    assert torch.equal(out[UP.format(3)], b[UP.format(2)])
    assert torch.equal(out[UP.format(1)], make_tensors(1)[UP.format(1)])


def test_inputs_and_bases_of_each_slice():
    plan = plan_of(without_base_parameters(TIES), make_sources())
    assert job(plan, UP.format(1)).inputs == (("base", UP.format(1)), ("a", UP.format(2)))
    assert job(plan, UP.format(2)).inputs == (("b", UP.format(0)), ("a", UP.format(2)))
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert job(plan, embedding).inputs == (("base", embedding), ("a", embedding))
    assert job(plan, norm).inputs == (("b", norm), ("a", norm))


def test_values_of_slices():
    plan = plan_of(without_base_parameters(TIES), make_sources())
    at = {name: job(plan, name).values for name in (UP.format(0), UP.format(1), UP.format(2))}
    # a model's own rule looks at its own layer, a shared one at that of the merge
    assert [v.per_model["weight"] for v in at.values()] == [(1.0,), (0.5,), (0.875,)]
    assert [v.shared["lambda"] for v in at.values()] == [0.5, 0.75, 0.75]
    # a curve runs over its slice; a slice of one layer takes its last value
    assert [v.per_model["density"] for v in at.values()] == [(0.25,), (0.75,), (0.5,)]
    outside = [job(plan, n).values for n in ("model.embed_tokens.weight", "lm_head.weight")]
    assert [v.per_model["weight"] for v in outside] == [(1.0,), (0.625,)]
    assert [v.per_model["density"] for v in outside] == [(0.25,), (0.5,)]


def test_slices_of_whole_models_are_the_models():
    text = """
merge_method: dare_ties
base_model: base
LISTED
  - {model: baseALL}
  - {model: aALL, parameters: {weight: [0.2, 0.7], density: 0.4}}
  - {model: bALL, parameters: {weight: {filter: mlp, value: 0.5}, density: [0.3, 0.9]}}
parameters: {weight: 0.25}
"""
    models = text.replace("LISTED", "models:").replace("ALL", "")
    slices = text.replace("LISTED", "slices:\n- sources:").replace("ALL", ", layer_range: [0, 3]")
    of_models, of_slices = merged(models, make_sources()), merged(slices, make_sources())
    assert of_models.keys() == of_slices.keys()
    assert all(torch.equal(of_models[name], of_slices[name]) for name in of_models)


def test_one_cache_serves_recipes_that_stack_differently():
    cache, sources = StatisticsCache(), make_sources()
    text = without_base_parameters(TIES)
    for layers in ("[1, 3]", "[0, 2]", "[1, 3]"):
        recipe = text.replace("model: a, layer_range: [1, 3]", f"model: a, layer_range: {layers}")
        warm, cold = merged(recipe, sources, cache), merged(recipe, sources)
        assert all(torch.equal(warm[name], cold[name]) for name in cold)


def test_random_masks_are_those_of_the_merged_tensor():
    text = """
merge_method: dare_linear
base_model: base
parameters: {weight: 1.0, density: 0.5}
"""
    models = merged(text + "models: [model: a]", make_sources())
    slices = (
        "slices: [{sources: [{model: base, layer_range: [1, 2]}, {model: a, layer_range: [1, 2]}]}]"
    )
    stacked = merged(text + slices, make_sources())
    base = make_tensors(0)
    kept = stacked[UP.format(0)] != base[UP.format(1)]
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(kept, models[UP.format(0)] != base[UP.format(0)])
    assert not torch.equal(kept, models[UP.format(1)] != base[UP.format(1)])


def test_a_bad_number_is_named_where_it_is():
    sources = make_sources(b={UP.format(1): torch.full((10, 6), torch.inf)})
    with pytest.raises(NonFiniteError, match=rf"^{UP.format(1)}: b holds NaN or Inf here\."):
        merged(STACK, sources)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "model: b, layer_range: [1, 3]",
            "model: b, layer_range: [2, 9]",
            "slices[1]: layer_range [2, 9] of b, which has 3 layers. Choose among layers 0 to 2.",
        ),
        (
            "sources: [{model: b, layer_range: [1, 3]}]",
            "sources: [{model: b, layer_range: [1, 3]}, {model: b, layer_range: [0, 2]}]",
            "slices[1]: b stands twice. List it once.\n"
            "slices[1]: passthrough takes exactly 1, and 2 (b, b) came.",
        ),
        (
            "sources: [{model: b, layer_range: [1, 3]}]",
            "sources: [{model: b, layer_range: [1, 3]}, {model: a, layer_range: [1, 3]}]",
            "slices[1]: passthrough takes exactly 1, and 2 (b, a) came.",
        ),
        (
            "merge_method: passthrough",
            "merge_method: slerp",
            "base_model: slerp needs one, and the recipe gives none. Add it.",
        ),
        (
            "merge_method: passthrough",
            "merge_method: slerp\nbase_model: b",
            "slices[0]: b, the base, is not among its sources, so it is not known which of its "
            "layers count. List it with a layer_range.\n"
            "slices[1]: slerp takes exactly 1 besides the base, and none came.",
        ),
        (
            "sources: [{model: b, layer_range: [1, 3]}]",
            "sources: [{model: b, layer_range: [1, 3]}]\n    base_model: b",
            "slices[1].base_model: b would have no effect in passthrough. Remove it.",
        ),
        (
            "sources: [{model: b, layer_range: [1, 3]}]",
            "sources: [{model: b, layer_range: [1, 3]}]\n    parameters: {scael: 2}",
            "slices[1].parameters: passthrough has no 'scael'. Did you mean scale?",
        ),
    ],
)
def test_slices_that_are_no_merge(old, new, message):
    assert problem(STACK.replace(old, new)) == message


def test_a_base_that_no_task_vector_needs_only_gives_its_config():
    text = STACK.replace("passthrough", "karcher").replace("model: a,", "model: b,")
    text = text.replace(
        "layer_range: [0, 2]}]", "layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]"
    )
    text = text.replace(
        "layer_range: [1, 3]}]", "layer_range: [1, 3]}, {model: a, layer_range: [1, 3]}]"
    )
    plan = plan_of(text + "base_model: base", make_sources())
    assert {(job.base, *(p.model for p in job.parents)) for job in plan.jobs} == {(None, "b", "a")}


def test_stacked_models_must_fit_the_config_of_the_donor():
    wide = {UP.format(1): torch.zeros(12, 6), UP.format(2): torch.zeros(12, 6)}
    assert problem(STACK, make_sources(b=wide)).splitlines()[0] == (
        f"{UP.format(2)}: the slices make (12, 6), and the config of a, which the merge takes, "
        "wants (10, 6). Stack models of one shape, or name another as base_model."
    )
    tied = make_sources(b={"lm_head.weight": None})
    assert problem(STACK, tied) == (
        "lm_head.weight: the slices make no such tensor, and the config of a, which the merge "
        "takes, wants (16, 6). Stack models of one shape, or name another as base_model."
    )


def test_the_config_must_know_every_layer():
    sources = make_sources()
    deep = {name.replace("layers.2", "layers.3"): t for name, t in make_tensors(2).items()}
    sources["b"] = MemorySource({**make_tensors(2), **deep}, "b")
    text = STACK.replace("[1, 3]", "[2, 4]")
    assert problem(text, sources) == (
        "base_model: the merge has a layer 3, and a, whose config it takes, has 3 layers. Name "
        "the deepest model as base_model, or list it first."
    )
    plan = plan_of(text + "base_model: b", sources)
    assert plan.layers is None  # b's own, in their order
    assert job(plan, UP.format(3)).inputs == (("b", UP.format(3)),)


def test_output_layers_are_described_by_the_donors():
    layout = layout_of(make_sources()["base"].names())
    assert output_depth(parse_recipe(STACK), layout) == [0, 1, 1, 2]
    assert output_depth(parse_recipe(TIES), layout) == [0, 1, 0]
    assert output_depth(parse_recipe("merge_method: m\nmodels: [model: a]"), layout) == [0, 1, 2]


def make_qwen2(seed, folder):
    """A random Qwen2 of two layers that ties its head, the second layer with a sliding window."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(make_tokenizer()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            tie_word_embeddings=True,
        )
        model = Qwen2ForCausalLM(config).float()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [make_model, make_qwen2], ids=["llama", "qwen2"])
def test_a_stack_is_a_model_that_transformers_runs(make, tmp_path):
    parents = [make(seed, tmp_path / name) for seed, name in enumerate("ab")]
    path = tmp_path / "stack.yaml"
    path.write_text(
        STACK.replace("model: a", "model: ./a")
        .replace("model: b, layer_range: [1, 3]", "model: ./b, layer_range: [0, 2]")
        .strip()
    )
    recipe, out = read_recipe(path), tmp_path / "out"
    digest = merge(recipe, out)
    stacked = AutoModelForCausalLM.from_pretrained(out).eval()
    assert stacked.config.num_hidden_layers == 4
    ours, (a, b) = stacked.state_dict(), (parent.state_dict() for parent in parents)
    for name, tensor in ours.items():
        place = int(name.split(".")[2]) if "layers." in name else None
        if place is not None:
            theirs = name.replace(f"layers.{place}.", f"layers.{place % 2}.")
            assert torch.equal(tensor, (a if place < 2 else b)[theirs]), name
    tied = stacked.config.tie_word_embeddings
    assert torch.equal(ours["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(ours["model.norm.weight"], b["model.norm.weight"])
    assert torch.equal(ours["lm_head.weight"], (a if tied else b)["lm_head.weight"])
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.equal(stacked(tokens).logits, by_hand(parents, stacked, tokens))

    # a live model of this depth gets the same bits
    sources = {str(ref): open_checkpoint(tmp_path / ref.path) for ref in recipe.references()}
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    changes = with_depth(read_json(tmp_path / "a" / "config.json", "a"), plan.layers)
    live = load_live_model(tmp_path / "a", torch.float32, None, "cpu", changes)
    with torch.no_grad():
        assert write_live(plan, sources, StatisticsCache(), live) == digest
        assert torch.equal(live(tokens).logits, stacked(tokens).logits)
    assert digest_of(open_checkpoint(out)) == digest


def by_hand(parents, stacked, tokens):
    """Run the parents' own layers one after another, each with the mask that it had."""
    a, b = parents
    hidden = a.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary = a.model.rotary_emb(hidden, positions)
    for model in parents:
        for number, layer in enumerate(model.model.layers):
            kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
            window = model.config.sliding_window if kinds[number] == "sliding_attention" else None
            hidden = layer(
                hidden,
                attention_mask=causal_mask(tokens.shape[1], window),
                position_ids=positions,
                position_embeddings=rotary,
            )
    head = stacked.lm_head
    return head(b.model.norm(hidden))


def causal_mask(length, window):
    """True where a token sees another: itself and those before it, in the window if there is one."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    sees = (distance >= 0) & (distance < (window or length))
    return sees[None, None]
