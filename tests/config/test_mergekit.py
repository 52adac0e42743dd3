from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.mergekit import MASK_VERSION, parse_recipe, read_recipe, write_recipe
from evomerge.config.models import FolderRef, ModelRef
from evomerge.config.recipe import Recipe, Rule, Slice, SliceSource, Source
from evomerge.config.tokenizer import ModelToken, TokenConfig, TokenizerConfig, ZeroRow
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
adapters = st.builds(FolderRef, path=paths, revision=st.none() | paths)
references = st.builds(
    ModelRef, path=paths, revision=st.none() | paths, adapter=st.none() | adapters
)
sources = st.builds(Source, model=references, parameters=settings)


@st.composite
def slices(draw):
    """A slice whose sources give as many layers each."""
    depth = draw(st.integers(1, 9))
    starts = draw(st.lists(st.integers(0, 99), min_size=1, max_size=2))
    return Slice(
        sources=tuple(
            SliceSource(
                model=draw(references),
                parameters=draw(settings),
                layer_range=(start, start + depth),
            )
            for start in starts
        ),
        base_model=draw(st.none() | references),
        parameters=draw(settings),
    )


rows = st.one_of(
    references,
    st.builds(ModelToken, kind=st.just("model_token"), model=references, token=texts),
    st.builds(
        ModelToken, kind=st.just("model_token"), model=references, token_id=st.integers(0, 9)
    ),
    st.just(ZeroRow(kind="zero")),
)
tokenizers = st.builds(
    TokenizerConfig,
    source=st.sampled_from(["union", "base"]) | texts,
    tokens=st.dictionaries(
        texts,
        st.builds(TokenConfig, source=rows, force=st.booleans()) | st.just(TokenConfig()),
        max_size=2,
    ),
    pad_to_multiple_of=st.none() | st.integers(1, 64),
)
forms = st.one_of(
    st.fixed_dictionaries({"models": st.lists(sources, min_size=1, max_size=3).map(tuple)}),
    st.fixed_dictionaries({"slices": st.lists(slices(), min_size=1, max_size=3).map(tuple)}),
)
vocabularies = st.one_of(
    st.fixed_dictionaries({"tokenizer": tokenizers}),
    st.fixed_dictionaries(
        {"tokenizer_source": st.sampled_from([None, "base", "union", "org/a", "org/a+org/b"])}
    ),
)


@st.composite
def recipes(draw):
    """A recipe of any form."""
    return Recipe(
        merge_method=draw(st.sampled_from(["linear", "ties", "dare_ties"]) | texts),
        **draw(forms),
        **draw(vocabularies),
        base_model=draw(st.none() | references),
        parameters=draw(settings),
        dtype=draw(st.sampled_from([None, "float32", "bfloat16", "float16"])),
        out_dtype=draw(st.sampled_from([None, "float32", "bfloat16", "float16"])),
        chat_template=draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]))),
        mask_seed=draw(st.integers(0, 2**32 - 1)),
        threshold_ties=draw(st.sampled_from(["keep", "index", "hash"])),
        rounding=draw(st.sampled_from(["nearest", "dither"])),
    )


@given(recipes())
def test_what_is_written_is_read_back(recipe):
    text = write_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert parse_recipe(text).hash == recipe.hash
    # a plain YAML reader, such as mergekit's, sees the same numbers
    plain = yaml.safe_load(text)
    listed = plain.get("models") or [s for part in plain["slices"] for s in part["sources"]]
    for source, written in zip(recipe.sources, listed, strict=True):
        for name, value in source.parameters.items():
            if isinstance(value, float):
                assert written["parameters"][name] == value


SLICES = """
merge_method: ties
base_model: org/base
slices:
  - sources:
      - {model: org/base, layer_range: [0, 2]}
      - {model: org/a, layer_range: [1, 3], parameters: {weight: 0.5}}
    parameters: {density: [0.25, 0.75]}
  - sources: [{model: org/b, layer_range: [2, 3]}]
    base_model: org/b
parameters: {weight: 1}
"""


def test_reads_slices():
    recipe = parse_recipe(SLICES)
    base, a, b = (ModelRef(path=f"org/{name}") for name in ("base", "a", "b"))
    assert recipe.slices == (
        Slice(
            sources=(
                SliceSource(model=base, layer_range=(0, 2)),
                SliceSource(model=a, layer_range=(1, 3), parameters={"weight": 0.5}),
            ),
            parameters={"density": (0.25, 0.75)},
        ),
        Slice(sources=(SliceSource(model=b, layer_range=(2, 3)),), base_model=b),
    )
    assert recipe.models == ()
    assert recipe.parameters == {"weight": 1.0}
    assert (recipe.donor, recipe.references()) == (base, (base, b, a))


def indented(text):
    return text.strip().replace("\n", "\n    ")


def test_one_module_is_read_as_what_is_in_it():
    head, tail = "merge_method: ties\nbase_model: org/base\n", "parameters: {weight: 1}\n"
    content = SLICES[SLICES.index("slices:") : SLICES.index("parameters: {weight: 1}")]
    text = f"{head}modules:\n  default:\n    {indented(content)}\n{tail}"
    assert parse_recipe(text) == parse_recipe(SLICES)
    assert "modules" not in write_recipe(parse_recipe(text))


def test_modules_that_are_alike_are_read_as_one():
    module = "{models: [{model: a, parameters: {weight: 2}}], parameters: {x: 1}}"
    text = f"merge_method: linear\nmodules: {{text_decoder: {module}, vision_tower: {module}}}"
    alone = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 2}}]\nparameters: {x: 1}"
    )
    assert parse_recipe(text) == parse_recipe(alone)


@pytest.mark.parametrize(
    ("module", "recipe", "joined"),
    [
        ("0.5", "0.25", 0.5),
        ("[0, 1]", "0.25", (0.0, 1.0)),
        (
            "{filter: mlp, value: 0.5}",
            "0.25",
            (Rule(filter="mlp", value=0.5), Rule(value=0.25)),
        ),
        (
            "{filter: mlp, value: 0.5}",
            "[{filter: attn, value: [0, 1]}]",
            (Rule(filter="mlp", value=0.5), Rule(filter="attn", value=(0.0, 1.0))),
        ),
    ],
)
def test_parameters_of_a_module_come_before_those_of_the_recipe(module, recipe, joined):
    text = f"""
merge_method: linear
modules:
  default:
    models: [model: a]
    parameters: {{weight: {module}, x: 1}}
parameters: {{y: 2, weight: {recipe}}}
"""
    assert parse_recipe(text).parameters == {"weight": joined, "x": 1.0, "y": 2.0}


def test_values_that_plain_yaml_reads_as_texts_are_numbers():
    text = """
merge_method: m
models: [model: a]
parameters:
  x: "1e-5"
  y: ["1e-5", 1]
  z: [{filter: "1e5", value: "2e-1"}]
  none:
"""
    parameters = parse_recipe(text.replace("  none:\n", "")).parameters
    assert parameters == {"x": 1e-5, "y": (1e-5, 1.0), "z": (Rule(filter="1e5", value=0.2),)}
    assert parse_recipe("merge_method: m\nmodels: [{model: a, parameters: }]").models == (
        Source(model=ModelRef(path="a")),
    )


def test_reads_tokenizer_template_and_references_as_mappings():
    recipe = parse_recipe("""
merge_method: linear
models:
  - model: {model: {path: org/a, revision: v1}, lora: {path: org/adapter}}
  - model: org/b@v2+org/other@main
tokenizer:
  source: union
  tokens:
    <a>: {source: org/b, force: true}
    <b>: {source: {kind: model_token, model: org/b, token_id: 3}}
    <c>: {source: {kind: zero}}
  pad_to_multiple_of: 8
chat_template: auto
""")
    assert [str(source.model) for source in recipe.models] == [
        "org/a@v1+org/adapter",
        "org/b@v2+org/other@main",
    ]
    assert recipe.tokenizer.tokens["<a>"] == TokenConfig(source=ModelRef(path="org/b"), force=True)
    assert recipe.tokenizer.tokens["<b>"].source.token_id == 3
    assert recipe.tokenizer.tokens["<c>"].source == ZeroRow(kind="zero")
    assert (recipe.tokenizer.pad_to_multiple_of, recipe.chat_template) == (8, "auto")


def test_a_tokenizer_source_may_be_a_mapping():
    text = "merge_method: linear\nmodels: [model: a]\n"
    for source, written in (
        ("union", "union"),
        ("{model: {path: org/a, revision: v1}}", "org/a@v1"),
    ):
        assert parse_recipe(f"{text}tokenizer_source: {source}").tokenizer_source == written


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


def test_settings_of_our_own_stand_under_a_key_that_mergekit_ignores():
    for setting, mask in (
        ("threshold_ties: index", ""),
        ("threshold_ties: hash", f"mask_seed: 0, mask: {MASK_VERSION}, "),
        ("rounding: dither", f"mask_seed: 0, mask: {MASK_VERSION}, "),
    ):
        text = write_recipe(parse_recipe(f"{TIES}evomerge: {{{setting}}}"))
        assert f"\nevomerge: {{{mask}{setting}}}\n" in text
        name = setting.partition(":")[0]
        assert f"# not to be replayed by mergekit: it ignores {name}\n" in text
    says_nothing = parse_recipe(f"{TIES}evomerge: {{threshold_ties: keep, rounding: nearest}}")
    assert write_recipe(says_nothing) == write_recipe(parse_recipe(TIES))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rounding: up", "evomerge.rounding: came 'up', allowed: 'nearest' or 'dither'."),
        (
            "threshold_ties: 1",
            "evomerge.threshold_ties: came 1, allowed: 'keep', 'index' or 'hash'.",
        ),
        ("treshold_ties: hash", "evomerge.treshold_ties: is not a setting here. Did you mean"),
    ],
)
def test_settings_that_are_not_known_are_refused(setting, message):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(f"{TIES}evomerge: {{{setting}}}", "r.yaml")
    assert str(caught.value).startswith(f"r.yaml:17: {message}")


def test_what_mergekit_cannot_replay_is_said_on_top():
    def notes(text):
        written = write_recipe(parse_recipe(text + "dtype: float32\n"))
        return [line for line in written.splitlines() if line.startswith("#")]

    models = "models: [{model: a, parameters: {weight: 1, cut: 0.5}}]\n"
    assert notes("merge_method: linear\nmodels: [model: a]\n") == [
        "# evomerge recipe; mergekit 0.1.5 reads it too"
    ]
    assert notes(f"merge_method: fourier\n{models}") == [
        "# evomerge recipe",
        "# not to be replayed by mergekit: it has no method fourier",
    ]
    assert notes(f"merge_method: linear\n{models}parameters: {{lamda: 1}}\n") == [
        "# evomerge recipe; mergekit 0.1.5 reads it too",
        "# not to be replayed by mergekit: it ignores lamda, cut",
    ]


def test_a_hash_does_not_change_with_fields_that_say_nothing():
    """Recorded before there were slices, tokenizer, chat_template, ties and rounding."""
    assert parse_recipe(TIES).hash == (
        "f222be58bea1b2d1f82d2fa300c7275e59822f98a8042bc8fcf845adfe1e9667"
    )
    assert parse_recipe(SLICES).hash != parse_recipe(SLICES.replace("[1, 3]", "[0, 2]")).hash


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
    path.write_text(
        "merge_method: linear\nslices:\n  - sources: [{model: ./b, layer_range: [0, 1]}]\n"
        "    base_model: ./b\ntokenizer: {source: ./b, tokens: {x: {source: ./b}, "
        "y: {source: {kind: model_token, model: ./b, token: z}}}}"
    )
    placed, b = read_recipe(path), str(tmp_path / "b")
    assert {ref.path for ref in placed.references()} == {b}
    assert placed.tokenizer.source == b
    assert placed.tokenizer.tokens["x"].source.path == b
    assert placed.tokenizer.tokens["y"].source.model.path == b
    assert [source.model.path for source in recipe.models] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "org/c",
    ]
    assert recipe.base_model.path == str(tmp_path.parent / "d")
    assert recipe.tokenizer_source == str(tmp_path / "b")
    assert parse_recipe("merge_method: linear\nmodels: [model: a]").models[0].model.path == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: []", "r.yaml:1: one of models, slices, modules is needed, and none came."),
        (
            "models: [model: a]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
            "r.yaml:3: slices: one of models, slices, modules is needed, and models and slices",
        ),
        (
            "modules: {a: {models: [model: a]}, b: {models: [model: b]}}",
            "r.yaml:2: modules: a, b differ, or have slices. Write models, or slices of the",
        ),
        (
            "modules: {a: {parameters: {x: 1}}}",
            "r.yaml:2: modules.a: one of models, slices is needed, and none came.",
        ),
        (
            "models: [model: a]\ntokenizer: {source: base}\ntokenizer_source: base",
            "r.yaml:3: tokenizer: tokenizer_source is given too. Keep tokenizer,",
        ),
        (
            "models: [model: a]\ntokenizer:\n  sorce: base",
            "r.yaml:4: tokenizer.sorce: is not a setting here. Did you mean source?",
        ),
        (
            "slices:\n  - sources:\n      - {model: a, layer_rnage: [0, 1]}",
            "r.yaml:4: slices[0].sources[0].layer_rnage: is not a setting here. "
            "Did you mean layer_range?",
        ),
        (
            "slices:\n  - sources:\n      - {model: a, layer_range: [3, 1]}",
            "r.yaml:4: slices[0].sources[0].layer_range: came [3, 1]; the first layer, from 0,",
        ),
        (
            "slices:\n  - sources:\n      - {model: a, layer_range: [0, 2]}\n"
            "      - {model: b, layer_range: [0, 3]}",
            "r.yaml:3: slices[0].sources: the sources of a slice must give the same number of "
            "layers, and a gives 2, b gives 3. Make",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 1}]",
            "r.yaml:2: slices[0].residual_weight: is not a setting here.",
        ),
        (
            "models: [model: a]\nparameters:\n  weight: [{fliter: mlp, value: 1}]",
            "r.yaml:4: parameters.weight: 'fliter' is no key of a rule. Did you mean filter?",
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
