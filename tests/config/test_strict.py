"""Every message names file, line and field, what came, what is allowed, and the nearest name."""

import pytest

from evomerge.config.recipe import Recipe
from evomerge.config.strict import override, parse_yaml, read_yaml, validate
from evomerge.config.suite import SuiteConfig
from evomerge.errors import ConfigError


def problems_of(text):
    data, origin = parse_yaml(text, "a.yaml")
    with pytest.raises(ConfigError) as caught:
        validate(SuiteConfig, data, origin)
    return str(caught.value).splitlines()


def test_all_problems_come_at_once_with_their_lines():
    assert problems_of(
        "tasks:\n"
        "  - task: a\n"
        "    metrc: acc\n"
        "    weight: -1\n"
        "items: {search: 12, confirm: {count: 1.5}}\n"
        "chunk: 3\n"
        "batch_size: 1e0\n"
    ) == [
        "a.yaml:2: tasks[0].metric: is missing. Add it.",
        "a.yaml:4: tasks[0].weight: came -1, allowed is at least 0.",
        "a.yaml:3: tasks[0].metrc: is not a setting here. Did you mean metric?",
        "a.yaml:5: items.confirm.count: came 1.5, a whole number is needed.",
        "a.yaml:7: batch_size: came 1.0, a whole number is needed.",
        "a.yaml:6: chunk: is not a setting here. Did you mean chunks?",
    ]


def test_nothing_is_converted_silently():
    task = "tasks: [{task: a, metric: acc, %s}]"
    assert "a number is needed" in problems_of(task % "weight: true")[0]
    assert "a number is needed" in problems_of(task % 'weight: "1.0"')[0]
    assert "a finite number" in problems_of(task % "weight: .nan")[0]
    assert "a text is needed" in problems_of("tasks: [{task: 3, metric: acc}]")[0]


def test_scientific_notation_is_a_number():
    data, _ = parse_yaml("{a: 1e-5, b: 2E3, c: 1.5, d: -3, e: 0x10, f: 1e, g: v1.2}")
    assert data == {"a": 1e-5, "b": 2000.0, "c": 1.5, "d": -3, "e": 16, "f": "1e", "g": "v1.2"}
    assert [type(v) for v in data.values()] == [float, float, float, int, int, str, str]


def test_a_key_given_twice_is_an_error():
    with pytest.raises(ConfigError, match=r"a\.yaml:3: x\.y is given twice"):
        parse_yaml("x:\n  y: 1\n  y: 2\n", "a.yaml")


def test_broken_yaml_names_the_line():
    with pytest.raises(ConfigError, match=r"a\.yaml:3: is not YAML"):
        parse_yaml("a: 1\nb: [1, 2\n", "a.yaml")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("2020-13-45", "timestamp"),
        ("2020-01-01T00:00:00+99:00", "timestamp"),
        ("0x_", "int"),
        ("0b_", "int"),
        ("9" * 5000, "int"),
        ("0x" + "f" * 5000, "int"),
        ("!!int x", "int"),
        ("!!int ''", "int"),
        ("!!float x", "float"),
        ("!!bool maybe", "bool"),
        ("!!timestamp x", "timestamp"),
    ],
)
def test_a_value_that_is_none_of_its_kind_names_the_line(value, kind):
    with pytest.raises(ConfigError, match=rf"a\.yaml:2: x\.y: came '.*not a usable {kind}\."):
        parse_yaml(f"x:\n  y: {value}\n", "a.yaml")
    if not value.startswith("!") and len(value) < 100:
        with pytest.raises(ConfigError, match=rf"a\.yaml:2: x: came '.*not a usable {kind}\."):
            parse_yaml(f"x:\n  {value}: y\n", "a.yaml")


@pytest.mark.parametrize("character", ["\x01", "\0", "\x7f"])
def test_a_control_character_names_the_line(character):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(f"a: 1\nb: {character}\n", "a.yaml")
    assert str(caught.value) == (
        f"a.yaml:2: is not YAML (character {character!r} is not allowed). Delete it."
    )


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "[" * 2000])
def test_endless_nesting_is_refused(text):
    with pytest.raises(ConfigError, match=r"^a\.yaml: is nested too deeply"):
        parse_yaml(text, "a.yaml")


@pytest.mark.parametrize(
    ("key", "shown"), [('""', "''"), ('"é!"', "é!"), ("float", "float"), ("[1]", "[1]")]
)
def test_an_odd_key_is_named_at_the_top_and_below(key, shown):
    top = problems_of(f"tasks: [{{task: a, metric: acc}}]\n? {key}\n: null\n")
    assert len(top) == 1
    assert top[0].startswith(f"a.yaml:2: {shown}: is not a setting here.")
    below = problems_of(f"tasks:\n- task: a\n  metric: acc\n  ? {key}\n  : null\n")
    assert len(below) == 1
    message, hint = below[0].split(" is not a setting here. ")
    assert message == f"a.yaml:4: tasks[0].{shown}:"
    names = ("floor", "metric")  # of a task; the suite has neither
    assert any(name in hint for name in names)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_an_empty_file_says_what_is_needed():
    data, origin = parse_yaml("", "a.yaml")
    with pytest.raises(ConfigError, match="a mapping of settings is needed"):
        validate(SuiteConfig, data, origin)


def test_override_reaches_lists_and_is_named_in_messages():
    data, origin = parse_yaml("tasks: [{task: a, metric: acc}]\n", "a.yaml")
    changed, origin = override(data, origin, ["tasks[0].weight=2", "items.search.count=7"])
    suite = validate(SuiteConfig, changed, origin)
    assert suite.tasks[0].weight == 2.0
    assert suite.items.search.count == 7
    assert "weight" not in data["tasks"][0], "the caller's data must not change"
    changed, origin = override(data, origin, ["chunks=0"])
    with pytest.raises(ConfigError, match=r"--set chunks: came 0, allowed is at least 1"):
        validate(SuiteConfig, changed, origin)


@pytest.mark.parametrize(
    "setting", ["chunks", "=3", "tasks.x.y=1", "tasks[5].task=b", "tasks[²].task=b"]
)
def test_an_override_that_leads_nowhere_is_refused(setting):
    data, origin = parse_yaml("tasks: [{task: a, metric: acc}]\n", "a.yaml")
    with pytest.raises(ConfigError, match="--set"):
        override(data, origin, [setting])


def test_recipe_hash_is_a_function_of_the_content():
    text = "{merge_method: ties, models: [{model: a/b, parameters: {weight: %s, density: 1}}]}"
    recipes = [validate(Recipe, *parse_yaml(text % w)) for w in ("0.5", "0.50", "0.500001")]
    assert recipes[0].hash == recipes[1].hash != recipes[2].hash
    assert Recipe.model_validate_json(recipes[2].model_dump_json()).hash == recipes[2].hash
