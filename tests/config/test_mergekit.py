from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.mergekit import MASK_VERSION, parse_recipe, read_recipe, write_recipe
from evomerge.config.models import ModelRef
from evomerge.config.recipe import Recipe, Rule, Source
from evomerge.errors import ConfigError

TIES = """
models:
  - model: org/a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: org/b@v1.2
    parameters:
      density: .33
      weight:
        - {filter: mlp, value: [0.5, 1e-5]}
        - value: 0
merge_method: ties
base_model: org/base
parameters: {normalize: true, int8_mask: true, lambda: {filter: attn, value: 2}}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.floats(0, 1)
texts = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1) | st.sampled_from(
    ["1e5", ".5", "1_000", "yes", "null", "~", "1:30", "0x1F", "2026-01-01", "*", "- a", "'", "#"]
)
curves = st.lists(numbers, min_size=1, max_size=5).map(tuple)
values = numbers | st.booleans() | curves
rules = st.lists(st.builds(Rule, filter=st.none() | texts, value=values), min_size=1, max_size=3)
settings = st.dictionaries(texts, values | rules.map(tuple), max_size=3)
paths = texts.filter(lambda text: not set("@+") & set(text))
references = st.builds(ModelRef, path=paths, revision=st.none() | paths)
recipes = st.builds(
    Recipe,
    merge_method=st.sampled_from(["linear", "ties", "dare_ties"]) | texts,
    models=st.lists(
        st.builds(Source, model=references, parameters=settings), min_size=1, max_size=3
    ).map(tuple),
    base_model=st.none() | references,
    parameters=settings,
    dtype=st.sampled_from([None, "float32", "bfloat16", "float16"]),
    out_dtype=st.sampled_from([None, "float32", "bfloat16", "float16"]),
    tokenizer_source=st.sampled_from([None, "base", "org/a"]),
    mask_seed=st.integers(0, 2**32 - 1),
)


@given(recipes)
def test_what_is_written_is_read_back(recipe):
    text = write_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert parse_recipe(text).hash == recipe.hash
    # a plain YAML reader, such as mergekit's, sees the same numbers
    plain = yaml.safe_load(text)
    for source, written in zip(recipe.models, plain["models"], strict=True):
        for name, value in source.parameters.items():
            if isinstance(value, float):
                assert written["parameters"][name] == value


def test_reads_everything_that_is_supported():
    recipe = parse_recipe(TIES)
    assert recipe == Recipe(
        merge_method="ties",
        models=(
            Source(
                model=ModelRef(path="org/a"), parameters={"density": (1.0, 0.7, 0.1), "weight": 1.0}
            ),
            Source(
                model=ModelRef(path="org/b", revision="v1.2"),
                parameters={
                    "density": 0.33,
                    "weight": (Rule(filter="mlp", value=(0.5, 1e-5)), Rule(value=0.0)),
                },
            ),
        ),
        base_model=ModelRef(path="org/base"),
        parameters={
            "normalize": True,
            "int8_mask": True,
            "lambda": (Rule(filter="attn", value=2.0),),
        },
        dtype="float32",
        out_dtype="bfloat16",
        tokenizer_source="base",
    )


def test_switches_stay_switches_and_numbers_numbers():
    parameters = parse_recipe(TIES).parameters
    assert parameters["normalize"] is True
    one = parse_recipe("merge_method: m\nmodels: [model: a]\nparameters: {x: 1, y: true}")
    assert one.parameters == {"x": 1.0, "y": True}
    assert [type(value) for value in one.parameters.values()] == [float, bool]


def test_masks_are_named_only_where_they_matter():
    plain = parse_recipe(TIES)
    assert "evomerge:" not in write_recipe(plain)
    assert "masks" not in write_recipe(plain)
    drawn = write_recipe(plain.model_copy(update={"merge_method": "dare_ties"}))
    assert f"evomerge: {{mask_seed: 0, mask: {MASK_VERSION}}}" in drawn
    assert "# not to be replayed by mergekit: its random masks are others" in drawn
    assert parse_recipe(TIES + "evomerge: {mask_seed: 3}").mask_seed == 3


def test_precision_is_remarked_upon_unless_it_is_float32():
    assert "mergekit computes in dtype" not in write_recipe(parse_recipe(TIES))
    assert "mergekit computes in dtype" in write_recipe(
        parse_recipe(TIES.replace("dtype: float32", "dtype: bfloat16", 1))
    )


def test_masks_of_another_version_are_refused():
    with pytest.raises(ConfigError) as caught:
        parse_recipe(TIES + "evomerge: {mask_seed: 3, mask: philox4x32-10}", "r.yaml")
    assert str(caught.value).startswith(
        f"r.yaml:17: evomerge.mask: came 'philox4x32-10', this version draws {MASK_VERSION!r}."
    )


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: ./b}, {model: org/c}]\n"
        "base_model: ../d\ntokenizer_source: ./b"
    )
    recipe = read_recipe(path)
    assert [source.model.path for source in recipe.models] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "org/c",
    ]
    assert recipe.base_model.path == str(tmp_path.parent / "d")
    assert recipe.tokenizer_source == str(tmp_path / "b")
    assert parse_recipe(path.read_text()).models[0].model.path == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: []", "r.yaml:2: slices: is not supported yet. Write models; what varies over"),
        ("modules: {}", "r.yaml:2: modules: is not supported yet. Write models;"),
        ("tokenizer: {}", "r.yaml:2: tokenizer: is not supported yet. Write tokenizer_source:"),
        ("chat_template: auto", "r.yaml:2: chat_template: is not supported yet. The template of"),
        ("models: [model: a+lora]", "r.yaml:2: models[0].model: came 'a+lora'; LoRA references"),
        (
            "models: [model: a]\nbase_model: b+c",
            "r.yaml:3: base_model: came 'b+c'; LoRA references",
        ),
        (
            "models: [model: a]\ntokenizer_source: union",
            "r.yaml:3: tokenizer_source: came 'union', which is not supported yet.",
        ),
        (
            "models: [model: a]\nbase_modle: b",
            "r.yaml:3: base_modle: is not a setting here. Did you mean base_model?",
        ),
        (
            "models: [{model: a, parameter: {}}]",
            "r.yaml:2: models[0].parameter: is not a setting here. Did you mean parameters?",
        ),
        ("models: [model: a]\nmask_seed: 1", "r.yaml:3: mask_seed: is not a setting here."),
        ("models: [model: a]\ndtype: int8", "r.yaml:3: dtype: came 'int8', allowed: 'float32',"),
        ("dtype: float32", "r.yaml:1: models: is missing. Add it."),
    ],
)
def test_what_is_not_supported_is_refused_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(f"merge_method: linear\n{text}", "r.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["abc", "[]", "[1, a]", "[true, false]", "{filter: a}", "[{filter: 3, value: 1}]", ".nan"],
)
def test_a_parameter_of_no_known_form_is_one_sentence(value):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(
            f"merge_method: m\nmodels: [model: a]\nparameters:\n  weight: {value}", "r.yaml"
        )
    assert str(caught.value).startswith("r.yaml:4: parameters.weight: came ")
    assert "a list of numbers (a layer curve), or a list of rules" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^/no/such\.yaml: cannot be read"):
        read_recipe(Path("/no/such.yaml"))
