"""The model card: what the hub reads from it, that it replays, and what it must not tell."""

from pathlib import Path

import pytest
import yaml

from evomerge.checkpoints.architecture import layout_of
from evomerge.config.mergekit import parse_recipe
from evomerge.config.models import ModelRef
from evomerge.merging.model_card import front_matter, model_card, portable
from evomerge.merging.plan import make_plan
from tests.merging.small import make_sources

RECIPE = """
merge_method: ties
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.5, density: 0.3}}}}
  - {{model: {b}, parameters: {{weight: [0.1, 0.2]}}}}
dtype: float32
"""
HUB = {"base": "org/llama-7b@v2", "a": "org/code-7b", "b": "lab.x/math_7b"}
LOCAL = {"base": "/srv/models/base", "a": "/srv/models/code", "b": "/srv/models/math"}


def recipe_of(models, text=RECIPE):
    return parse_recipe(text.format(**models))


def plan_of(models, text=RECIPE):
    recipe = recipe_of(models, text)
    held = make_sources()
    sources = dict(zip(map(str, recipe.references()), held.values(), strict=True))
    return make_plan(recipe, sources, layout_of(held["base"].names()))


def card_of(models, folders=None, text=RECIPE):
    return model_card(plan_of(models, text), "d1" * 32, folders or {})


def head_and_text(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_front_matter_names_the_models_of_the_hub():
    head, text = head_and_text(card_of(HUB))
    assert head == {
        "base_model": ["org/llama-7b", "org/code-7b", "lab.x/math_7b"],
        "library_name": "transformers",
        "tags": ["merge", "evomerge", "ties"],
    }
    assert "# Merge of code-7b, math_7b\n" in text
    assert "- Base: [org/llama-7b@v2](https://huggingface.co/org/llama-7b/tree/v2)\n" in text
    assert "- Model: [org/code-7b](https://huggingface.co/org/code-7b)\n" in text
    assert "[ties](https://arxiv.org/abs/2306.01708)" in text


def test_an_adapter_is_a_base_model_too():
    recipe = recipe_of({**HUB, "a": "org/llama-7b+org/code-lora@main"})
    assert front_matter(recipe, {})["base_model"] == [
        "org/llama-7b",
        "org/code-lora",
        "lab.x/math_7b",
    ]
    local = recipe_of({**HUB, "a": "org/llama-7b+/srv/loras/code"})
    assert front_matter(local, {})["base_model"] == ["org/llama-7b", "lab.x/math_7b"]
    assert str(portable(local).models[0].model) == "org/llama-7b+./code"


def test_folders_of_this_machine_are_not_told():
    head, text = head_and_text(card_of(LOCAL))
    assert "base_model" not in head
    assert "/srv" not in text
    assert "- Base: `./base`\n- Model: `./code`\n- Model: `./math`\n" in text


def test_the_recipe_in_the_card_is_the_recipe():
    block = card_of(HUB).split("```yaml\n")[1].split("```")[0]
    assert parse_recipe(block) == recipe_of(HUB)
    block = card_of(LOCAL).split("```yaml\n")[1].split("```")[0]
    assert parse_recipe(block, folder=Path("/srv/models")) == recipe_of(LOCAL)


def test_folders_of_one_name_are_told_apart():
    models = {"base": "/srv/base/final", "a": "/srv/code/final", "b": "/srv/code/best"}
    short = portable(recipe_of(models))
    names = [str(reference) for reference in short.references()]
    assert names == ["./base/final", "./code/final", "./code/best"]


def test_a_path_that_begins_another_is_not_mistaken_for_it():
    models = {"base": "/srv/m", "a": "/srv/m/code", "b": "/srv/m-chat"}
    names = [str(reference) for reference in portable(recipe_of(models)).references()]
    assert names == ["./m", "./code", "./m-chat"]


def test_the_tokenizers_folder_is_shortened_too():
    text = RECIPE + "tokenizer_source: /srv/models/chat\n"
    assert portable(recipe_of(LOCAL, text)).tokenizer_source == "./chat"


def test_the_card_says_how_it_was_made_and_what_must_come_out():
    card = card_of(HUB)
    assert "evomerge merge recipe.yaml OUT" in card
    assert "d1" * 32 in card
    assert "- Tensors: 9, 396 parameters, float32\n" in card
    assert card == card_of(HUB)


def test_whether_mergekit_replays_it_is_said():
    assert "mergekit cannot replay" not in card_of(HUB)
    random = RECIPE.replace("ties", "dare_ties")
    assert "mergekit cannot replay the recipe" in card_of(HUB, text=random)


@pytest.fixture
def folders(tmp_path):
    found = {name: tmp_path / name for name in HUB}
    for folder in found.values():
        folder.mkdir()
        (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    return found


def test_a_licence_that_all_models_state_is_stated(folders):
    recipe = recipe_of(HUB)
    assert front_matter(recipe, folders)["license"] == "apache-2.0"
    named = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"
    for folder in folders.values():
        (folder / "README.md").write_text(named)
    head = front_matter(recipe, folders)
    assert (head["license"], head["license_name"]) == ("other", "llama3")


@pytest.mark.parametrize(
    "other",
    [
        None,
        "",
        "# no front matter",
        "---\nlicense: mit\n---\n",
        "---\nlicense: other\nlicense_name: llama3\n---\n",
        "---\n: {\n---\n",
        "---\nunclosed",
        "---\n- a list\n---\n",
        "---\nlicense: [apache-2.0]\n---\n",
    ],
)
def test_a_licence_that_one_model_does_not_state_is_left_out(folders, other):
    path = folders["b"] / "README.md"
    path.unlink() if other is None else path.write_text(other)
    assert "license" not in front_matter(recipe_of(HUB), folders)
    assert "license_name" not in front_matter(recipe_of(HUB), folders)


def test_a_model_without_a_card_says_nothing_of_its_licence(tmp_path):
    assert "license" not in front_matter(recipe_of(HUB), dict.fromkeys(HUB, tmp_path))


def test_a_hub_id_is_not_a_path():
    for path in ("./org/code", "~/code", "models/a/b", "code", "/srv/code", ".cache/code"):
        recipe = parse_recipe(RECIPE.format(**HUB)).model_copy(
            update={"base_model": ModelRef(path=path)}
        )
        assert path not in front_matter(recipe, {})["base_model"]
