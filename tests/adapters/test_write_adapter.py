"""Recipes of adapters, written as one adapter: equal to the full merge, loaded by PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.adapters.open import fingerprint_of, open_model
from evomerge.checkpoints.architecture import layout_of
from evomerge.config.recipe import Recipe, Source
from evomerge.errors import CheckpointError, MergeError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.adapter import write_adapter
from evomerge.merging.execute import merged_tensors
from evomerge.merging.plan import make_plan
from tests.adapters.small import layer, make_adapter, reference
from tests.tiny import make_model, make_tokenizer

Q0, Q1, O0, HEAD = layer(0), layer(1), layer(0, "self_attn.o_proj"), "lm_head"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = folder / "base"
    make_model(0, base)
    make_model(7, folder / "other")
    make_adapter(folder / "a", base, 1, {Q0: 4, Q1: 2}, rank_pattern={"1.*q_proj": 2})
    ranks = {Q0: 3, O0: 3, HEAD: 3}
    make_adapter(folder / "b", base, 2, ranks, r=3, use_rslora=True, alpha_pattern={"o_proj": 5})
    make_adapter(folder / "c", base, 3, {Q1: 4}, saved=[NORM])
    return folder


def parent(models, name, **parameters):
    adapter = None if name == "base" else models / name
    return Source(model=reference(models / "base", adapter), parameters=parameters)


def task_arithmetic(models, *sources, **parameters):
    return Recipe(
        merge_method="task_arithmetic",
        base_model=reference(models / "base"),
        models=sources,
        parameters=parameters,
    )


def three(models):
    """Curves over the layers, a negative weight, lambda."""
    return task_arithmetic(
        models,
        parent(models, "a", weight=(0.7, -0.4)),
        parent(models, "b", weight=-0.3),
        parent(models, "c", weight=1.2),
        **{"lambda": 0.9},
    )


def mean(models):
    """A mean with the model itself, normalised."""
    sources = (
        parent(models, "base", weight=1.0),
        parent(models, "a", weight=1.0),
        parent(models, "b", weight=3.0),
    )
    return Recipe(merge_method="linear", models=sources)


def merged(recipe):
    sources = {str(ref): open_model(ref) for ref in recipe.references()}
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    return merged_tensors(plan, sources, StatisticsCache())


@pytest.mark.parametrize("make", [three, mean])
def test_the_adapter_on_the_base_is_the_full_merge(models, tmp_path, make):
    recipe = make(models)
    report = write_adapter(recipe, tmp_path / "out")
    ours = open_model(reference(models / "base", tmp_path / "out"))
    for name, tensor in merged(recipe).items():
        # float32 sums of at most four terms, in another order
        torch.testing.assert_close(ours.read(name).float(), tensor, rtol=0, atol=1e-6)
    assert report.worst is None
    assert report.ranks[Q0] == 7
    assert report.replaced == ((NORM,) if make is three else ())
    changed = [n for n in ours.names() if not torch.equal(ours.read(n), ours.base.read(n))]
    assert changed == sorted([f"{module}.weight" for module in report.ranks] + [*report.replaced])


def test_a_truncated_adapter_tells_what_it_leaves_out(models, tmp_path):
    recipe = three(models)
    exact, cut = tmp_path / "exact", tmp_path / "cut"
    write_adapter(recipe, exact)
    report = write_adapter(recipe, cut, rank=4)
    assert max(report.ranks.values()) == 4
    assert set(report.residuals) == {Q0, Q1}  # ranks 7 and 6; the others have no more than 3
    one, other = (open_model(reference(models / "base", folder)) for folder in (exact, cut))
    relative = {}
    for module, residual in report.residuals.items():
        name = f"{module}.weight"
        whole = one.read(name).double() - one.base.read(name).double()
        difference = one.read(name).double() - other.read(name).double()
        assert float(difference.norm()) == pytest.approx(residual.absolute, rel=1e-4)
        relative[module] = float(difference.norm() / whole.norm())
        assert relative[module] == pytest.approx(residual.relative, rel=1e-4)
    assert report.worst[0] == max(relative, key=relative.get)
    assert report.worst[1].relative > 0.01
    record = json.loads((cut / "evomerge.json").read_text())
    assert record["adapter"]["residuals"][Q0]["absolute"] == report.residuals[Q0].absolute
    assert record["fingerprints"] == {
        str(ref): fingerprint_of(open_model(ref)) for ref in recipe.references()
    }


def test_weights_of_zero_take_no_rank(models, tmp_path):
    recipe = task_arithmetic(
        models, parent(models, "a", weight=0.0), parent(models, "b", weight=1.0)
    )
    report = write_adapter(recipe, tmp_path / "out")
    assert report.ranks == {Q0: 3, O0: 3, HEAD: 3}


def test_a_copied_embedding_is_no_replacement(models, tmp_path):
    """PEFT saves adapted embeddings and heads whole beside their factors."""
    make_adapter(tmp_path / "e", models / "base", 5, {HEAD: 2}, r=2)
    path = tmp_path / "e" / "adapter_model.safetensors"
    tensors = load_file(path)
    base = open_model(reference(models / "base"))
    tensors["base_model.model.lm_head.base_layer.weight"] = base.read("lm_head.weight").clone()
    save_file(tensors, path)
    source = Source(model=reference(models / "base", tmp_path / "e"), parameters={"weight": 1.0})
    report = write_adapter(task_arithmetic(models, source), tmp_path / "out")
    assert (report.ranks, report.replaced) == ({HEAD: 2}, ())


def test_a_replaced_tied_embedding_is_written_for_the_head_too(tmp_path):
    """PEFT looks for both where the head follows the embedding."""
    make_model(0, tmp_path / "base", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    make_adapter(
        tmp_path / "e", tmp_path / "base", 1, {}, saved=[embedding], ensure_weight_tying=True
    )
    recipe = task_arithmetic(tmp_path, parent(tmp_path, "e", weight=0.5))
    report = write_adapter(recipe, tmp_path / "out")
    assert report.replaced == (embedding,)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = merged(recipe)[embedding]
    assert sorted(written) == [f"base_model.model.{n}" for n in ("lm_head.weight", embedding)]
    assert all(torch.equal(tensor, expected) for tensor in written.values())
    ours = open_model(reference(tmp_path / "base", tmp_path / "out"))
    assert torch.equal(ours.read(embedding), expected)


def refused(recipe, out, message, error=MergeError):
    with pytest.raises(error, match=message):
        write_adapter(recipe, out)
    assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []


def test_what_is_no_sum_of_adapters_is_refused(models, tmp_path):
    out = tmp_path / "out"
    a, b = parent(models, "a", weight=0.5), parent(models, "b", weight=0.7)
    refused(
        Recipe(merge_method="ties", base_model=reference(models / "base"), models=(a, b)),
        out,
        "ties: is not a sum of adapters; linear and task_arithmetic are",
    )
    refused(
        Recipe(merge_method="linear", models=(a, b), parameters={"normalize": False}),
        out,
        r"weights add up to 1\.2, which scales the model itself",
    )
    full = Source(model=reference(models / "other"), parameters={"weight": 1.0})
    refused(task_arithmetic(models, a, full), out, "other: is not .*base with an adapter")
    based = Recipe(merge_method="task_arithmetic", base_model=a.model, models=(b,))
    refused(based, out, "base_model: .* has an adapter")
    zero = task_arithmetic(models, parent(models, "a", weight=0.0))
    refused(zero, out, "task_arithmetic: .*all weights are 0")
    other = task_arithmetic(models, a).model_copy(update={"tokenizer_source": "union"})
    refused(other, out, "neither layers nor vocabulary")
    dithered = three(models).model_copy(update={"rounding": "dither"})
    refused(dithered, out, "evomerge.rounding: came dither, and an adapter is written before")
    assert not out.exists()


def test_a_full_folder_is_not_touched(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    refused(three(models), tmp_path / "out", "not an empty folder", CheckpointError)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("make", [three, mean])
def test_peft_computes_the_logits_of_the_full_merge(models, tmp_path, make):
    peft = pytest.importorskip("peft", reason="pip install peft")
    from transformers import AutoModelForCausalLM

    recipe = make(models)
    write_adapter(recipe, tmp_path / "out")
    tokens = make_tokenizer()("the quick brown fox", return_tensors="pt")
    base, full = (AutoModelForCausalLM.from_pretrained(models / "base") for _ in range(2))
    with torch.no_grad():
        before = full(**tokens).logits
        full.load_state_dict(merged(recipe))
        expected = full(**tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        logits = adapted(**tokens).logits
    # float32 through two layers, in another order
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 1
