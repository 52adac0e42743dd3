"""AdapterSource against PEFT's own merges, and everything else that asks a source something."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.adapters.open import fingerprint_of, open_model
from evomerge.adapters.source import AdapterSource
from evomerge.checkpoints.fingerprint import digest_of, fingerprint
from evomerge.checkpoints.reader import LazyCheckpoint
from evomerge.errors import CheckpointError
from tests.adapters.small import layer, make_adapter, reference, write_adapter_files
from tests.tiny import VOCABULARY, make_model

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
EMBED, HEAD = "model.embed_tokens", "lm_head"
NUM_TOKENS = len(VOCABULARY)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_weights_are_those_of_pefts_merge(case):
    """Rank and alpha patterns, rsLoRA, modules_to_save; Conv1D (a square one too), embeddings."""
    source = open_model(reference(GOLDEN / case / "base", GOLDEN / case / "adapter"))
    merged = load_file(GOLDEN / case / "merged.safetensors")
    assert source.names() == tuple(sorted(merged))
    for name, tensor in merged.items():
        # PEFT rounds the product and the sum to float32, we the sum only: two half units each
        unit = torch.finfo(torch.float32).eps * tensor.abs().max()
        assert (source.read(name) - tensor).abs().max() <= 2 * unit, name
        assert source.read(name).dtype == source.dtype(name)
        assert source.read(name).shape == source.shape(name)
    untouched = [name for name in merged if torch.equal(merged[name], source.base.read(name))]
    assert 0 < len(untouched) < len(merged)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model(0, folder / "base", torch.bfloat16)
    make_model(0, folder / "tied", tie_word_embeddings=True)
    make_adapter(folder / "lora", folder / "base", 1, {layer(0): 4}, saved=["model.norm.weight"])
    return folder


def test_a_small_adapter_is_not_rounded_away(models, tmp_path):
    make_adapter(tmp_path, models / "base", 1, {layer(0): 4}, lora_alpha=1e-3)
    source = open_model(reference(models / "base", tmp_path))
    name = f"{layer(0)}.weight"
    base, adapted = source.base.read(name).float(), source.read(name)
    held = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.{layer(0)}.lora_{x}.weight"].double() for x in "AB")
    expected = base.double() + 1e-3 / 4 * b @ a
    assert torch.equal(adapted, expected.float())
    assert source.dtype(name) == adapted.dtype == torch.float32
    assert source.merged_dtype(name) == source.main_dtype == torch.bfloat16
    # all but the smallest weights, whose units are small
    assert (adapted.bfloat16() == base).float().mean() > 0.9


def test_reads_do_not_depend_on_the_number_of_threads(models):
    source = open_model(reference(models / "base", models / "lora"))
    digests = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        digests.append(digest_of(source))
    torch.set_num_threads(threads)
    assert digests[0] == digests[1]


def test_large_tensors_are_adapted_block_by_block(models, monkeypatch):
    source = open_model(reference(models / "base", models / "lora"))
    whole = digest_of(source)
    monkeypatch.setattr("evomerge.adapters.adapter._BLOCK", 100)
    assert digest_of(source) == whole


def test_pickled_and_streamed_sources_are_the_same(models):
    ref = reference(models / "base", models / "lora")
    source = open_model(ref)
    assert isinstance(source, AdapterSource)
    for copy in (pickle.loads(pickle.dumps(source)), open_model(ref, mapped=False)):
        assert digest_of(copy) == digest_of(source)
        assert (copy.label, copy.folder, copy.tied) == (str(ref), models / "base", source.tied)
        assert copy.total_bytes == source.total_bytes
    adapter_bytes = sum(
        t.nbytes for t in load_file(models / "lora/adapter_model.safetensors").values()
    )
    assert source.total_bytes == source.base.total_bytes + adapter_bytes


def test_a_square_linear_layer_with_a_bias_is_not_transposed(tmp_path):
    """Its shape does not tell it from a Conv1D; its neighbours' biases do."""
    make_model(0, tmp_path / "base", attention_bias=True)
    make_adapter(tmp_path / "lora", tmp_path / "base", 1, {layer(0): 4})
    source = open_model(reference(tmp_path / "base", tmp_path / "lora"))
    name = f"{layer(0)}.weight"
    part = source.adapter.low_rank[name]
    assert f"{layer(0)}.bias" in source
    assert part.shape == (32, 32)
    expected = source.base.read(name) + part.scale * part.b_OR @ part.a_RI
    torch.testing.assert_close(source.read(name), expected, rtol=0, atol=1e-6)


def test_a_plain_model_is_opened_as_ever(models):
    source = open_model(reference(models / "base"))
    assert type(source) is LazyCheckpoint
    assert fingerprint_of(source) == fingerprint(models / "base")


def test_every_number_of_an_adapter_shows_in_the_fingerprint(models, tmp_path):
    prints = [fingerprint(models / "base")]
    for part in (None, "lora_A", "lora_B", "norm"):
        prints.append(_fingerprint(models / "base", tmp_path / str(part), part))
    prints.append(_fingerprint(models / "base", tmp_path / "alpha", None, lora_alpha=9))
    assert len(set(prints)) == 6
    assert _fingerprint(models / "base", tmp_path / "again", None) == prints[1]


def _fingerprint(base, folder, nudged, **fields):
    make_adapter(folder, base, 1, {layer(0): 4}, saved=["model.norm.weight"], **fields)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if nudged and nudged in name:
            tensor.view(-1)[-1] += 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    return fingerprint_of(open_model(reference(base, folder)))


def test_pickled_adapters_are_read_and_code_in_them_is_not_run(models, tmp_path):
    make_adapter(
        tmp_path, models / "base", 1, {layer(0): 4}, file="bin", saved=["model.norm.weight"]
    )
    ours = open_model(reference(models / "base", tmp_path))
    theirs = open_model(reference(models / "base", models / "lora"))
    assert digest_of(ours) == digest_of(theirs)
    torch.save({"x": Path("/")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_model(reference(models / "base", tmp_path))
    (tmp_path / "adapter_model.bin").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is truncated"):
        open_model(reference(models / "base", tmp_path))


def tied_adapter(folder, low_rank=(), saved=(), value=1.0, **fields):
    """An adapter for embedding and head of the tied model."""
    tensors = {
        f"base_model.model.{name}.weight": torch.full((NUM_TOKENS, 32), value) for name in saved
    }
    for module in low_rank:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, 32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(NUM_TOKENS, 2)
    write_adapter_files(folder, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields})


def test_a_tied_head_follows_where_the_adapter_says_so(models, tmp_path):
    name = f"{EMBED}.weight"
    tied_adapter(tmp_path / "both", saved=[EMBED, HEAD])
    tied_adapter(tmp_path / "follows", saved=[EMBED], ensure_weight_tying=True)
    for folder in ("both", "follows"):
        source = open_model(reference(models / "tied", tmp_path / folder))
        assert source.tied == {f"{HEAD}.weight": name}
        assert source.read(name).eq(1).all()
        assert f"{HEAD}.weight" not in source


@pytest.mark.parametrize(
    "parts",
    [
        {"saved": [HEAD]},
        {"saved": [EMBED]},
        {"low_rank": [HEAD]},
        {"low_rank": [HEAD], "saved": [EMBED]},
        {"saved": [HEAD], "ensure_weight_tying": True},
    ],
)
def test_a_head_that_would_be_tied_no_more_is_refused(models, tmp_path, parts):
    tied_adapter(tmp_path, **parts)
    with pytest.raises(CheckpointError, match=r"uses model\.embed_tokens\.weight for both"):
        open_model(reference(models / "tied", tmp_path))


def test_an_unchanged_copy_of_a_tied_head_is_no_change(models, tmp_path):
    base = open_model(reference(models / "tied"))
    embedding = base.read(f"{EMBED}.weight").clone()
    make_adapter(tmp_path, models / "tied", 1, {layer(0): 4})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = embedding
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    source = open_model(reference(models / "tied", tmp_path))
    assert source.names() == base.names()
    assert torch.equal(source.read(f"{EMBED}.weight"), embedding)
