"""From a recipe file to a folder that transformers loads."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.architecture import layout_of
from evomerge.checkpoints.fingerprint import digest_of, fingerprint
from evomerge.checkpoints.reader import open_checkpoint
from evomerge.config.mergekit import MASK_VERSION, read_recipe
from evomerge.errors import CheckpointError
from evomerge.kernels.statistics import StatisticsCache
from evomerge.merging.live import write_live
from evomerge.merging.plan import make_plan
from evomerge.merging.run import merge, merge_together
from tests.tiny import make_model

RECIPE = """
merge_method: dare_ties
base_model: ./base
models:
  - {model: ./a, parameters: {weight: [0.2, 0.9], density: 0.6}}
  - {model: ./b, parameters: {weight: 0.4}}
out_dtype: bfloat16
evomerge: {mask_seed: 5}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        make_model(seed, folder / name, torch.bfloat16)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def out(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "merged"
    merge(read_recipe(models / "recipe.yaml"), folder)
    return folder


def test_transformers_loads_what_the_live_model_computes(models, out):
    recipe = read_recipe(models / "recipe.yaml")
    sources = {str(ref): open_checkpoint(models / ref.path) for ref in recipe.references()}
    plan = make_plan(recipe, sources, layout_of(sources[str(recipe.donor)].names()))
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.bfloat16)
    digest = write_live(plan, sources, StatisticsCache(), model)
    assert digest == digest_of(open_checkpoint(out))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is torch.bfloat16
    tokens = AutoTokenizer.from_pretrained(out)("the quick brown fox", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, loaded(**tokens).logits)


def test_provenance_tells_what_went_in(models, out):
    record = json.loads((out / "evomerge.json").read_text())
    recipe = read_recipe(models / "recipe.yaml")
    assert record["digest"] == digest_of(open_checkpoint(out))
    assert (record["recipe_hash"], record["masks"]) == (recipe.hash, MASK_VERSION)
    assert record["fingerprints"] == {
        str(models / name): fingerprint(models / name) for name in ("base", "a", "b")
    }
    assert record["packages"]["torch"] == torch.__version__
    assert "tokenizer.json" in record["tokenizer_files"]


def test_the_recipe_beside_the_weights_gives_the_same_files(out, tmp_path):
    recipe = read_recipe(out / "recipe.yaml")
    merge(recipe, tmp_path / "again")
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_tokenizer_of_another_model_goes_along(models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("hello")
    recipe = read_recipe(models / "recipe.yaml").model_copy(
        update={"tokenizer_source": str(tmp_path / "chat")}
    )
    merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"


def test_a_full_folder_is_not_touched(models, out, tmp_path):
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="not an empty folder"):
        merge(read_recipe(models / "recipe.yaml"), out)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_population_is_what_its_recipes_are_alone(models, out, tmp_path):
    recipe = read_recipe(models / "recipe.yaml")
    (models / "other.yaml").write_text(RECIPE.replace("0.4", "-0.3"))
    other = read_recipe(models / "other.yaml")
    read_bytes = []
    digests = merge_together(
        [recipe, other],
        [tmp_path / "one", tmp_path / "two"],
        notify=lambda progress: read_bytes.append(progress.read_bytes),
    )
    assert digests == [digest_of(open_checkpoint(out)), merge(other, tmp_path / "alone")]
    for folder, alone in ((tmp_path / "one", out), (tmp_path / "two", tmp_path / "alone")):
        files = sorted(path.name for path in alone.iterdir())
        assert sorted(path.name for path in folder.iterdir()) == files
        for file in files:
            assert (folder / file).read_bytes() == (alone / file).read_bytes()
    used = (recipe.references(), other.references())
    num_models = len({str(reference) for references in used for reference in references})
    size = open_checkpoint(models / "base").total_bytes
    assert read_bytes[-1] == num_models * size


def test_a_population_that_fails_leaves_nothing_behind(models, tmp_path):
    recipe = read_recipe(models / "recipe.yaml")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="two"):
        merge_together([recipe, recipe], [tmp_path / "one", tmp_path / "two"])
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
