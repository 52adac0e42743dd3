"""What only the whole config can know: names of models, where paths lead, which line a later problem belongs to."""

import pytest

from evomerge.config.models import ModelRef
from evomerge.config.search import load_search, make_search, place_problems
from evomerge.errors import ConfigError

TEXT = """
study: {name: s, folder: ../runs/s, budget: {evaluations: 4}}
models:
  base: ./base
  parents:
    a: ./a
    b: org/model@v2
merge: {method: linear}
space: {weight: {search: [0, 1]}}
suite:
  include_path: tasks
  tasks: [{task: t, metric: acc}]
"""


@pytest.fixture
def write(tmp_path):
    def config(text):
        (tmp_path / "configs").mkdir(exist_ok=True)
        path = tmp_path / "configs" / "c.yaml"
        path.write_text(text)
        return path

    return config


def test_relative_paths_are_read_from_the_config_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load_search(write(TEXT))
    assert config.study.folder == str(tmp_path / "runs" / "s")
    assert config.study.journal == tmp_path / "runs" / "s" / "journal.log"
    assert config.models.base.path == str(tmp_path / "configs" / "base")
    assert (config.models.parents["b"].path, config.models.parents["b"].revision) == (
        "org/model",
        "v2",
    )
    assert config.suite.include_path == (str(tmp_path / "configs" / "tasks"),)
    database = load_search(write(TEXT), ["study.storage=sqlite:///x.db"])
    assert database.study.journal is None


def test_the_home_folder_stands_for_itself_in_every_path(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = TEXT.replace("../runs/s", "~/s").replace("include_path: tasks", "include_path: ~/t")
    config = load_search(write(text.replace("./base", "~/base")), ["study.storage=~/x.log"])
    assert config.study.folder == str(tmp_path / "s")
    assert config.study.journal == tmp_path / "x.log"
    assert config.models.base.path == str(tmp_path / "base")
    assert config.suite.include_path == (str(tmp_path / "t"),)


def test_a_database_is_left_as_it_is_and_a_journal_is_read_from_the_config_file(write, tmp_path):
    database = load_search(write(TEXT), ["study.storage=sqlite:///~nouser/../x.db"])
    assert database.study.storage == "sqlite:///~nouser/../x.db"
    journal = load_search(write(TEXT), ["study.storage=../x.log"])
    assert journal.study.storage == str(tmp_path / "x.log")
    assert load_search(write(TEXT)).study.storage is None


@pytest.mark.parametrize("path", ["~nouser/x", "a\0b"])
def test_paths_that_cannot_be_are_named_all_at_once(write, path):
    written = path.replace("\0", "\\0")
    text = TEXT.replace("folder: ../runs/s", f'folder: "{written}", storage: "{written}"')
    text = text.replace("./base", f'"{written}"').replace("b: org/model@v2", f'b: "{written}"')
    text = text.replace("include_path: tasks", f'include_path: ["{written}"]')
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        load_search(file)
    lines = str(caught.value).splitlines()
    places = {line.partition(f": {path!r} is not a usable path (")[0] for line in lines}
    assert len(lines) == 5
    assert places == {
        f"{file}:2: study.folder",
        f"{file}:2: study.storage",
        f"{file}:4: models.base",
        f"{file}:7: models.parents.b",
        f"{file}:11: suite.include_path[0]",
    }


def test_a_name_too_long_for_a_file_is_no_local_model(tmp_path):
    reference = ModelRef(path="a" * 300)
    assert reference.relative_to(tmp_path) == reference


@pytest.mark.parametrize(("population", "fits"), [(10_000, True), (10_001, False)])
def test_a_population_has_an_upper_bound(write, population, fits):
    setting = [f"proposer.population={population}"]
    if fits:
        assert load_search(write(TEXT), setting).proposer.population == population
    else:
        with pytest.raises(ConfigError, match=r"came 10001, allowed is at most 10000\."):
            load_search(write(TEXT), setting)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("b: org/model@v2", "b: ./a", r"c\.yaml:7: models\.parents\.b: is the same model as a\."),
        ("b: org/model@v2", "b: ./base", r"models\.parents\.b: is the same model as base\."),
        ("b: org/model@v2", "base: ./b", r"models\.parents.*'base' is not usable"),
        ("method: linear", "method: linear, tokenizer: c", r"c\.yaml:8: merge\.tokenizer: no model is called 'c'"),
        ("method: linear", "method: linear, parameters: {weight: {aa: 1}}", r"weight\.aa: no parent is called 'aa'\. Did you mean a\?"),
        ("suite:", "workers: {count: 2}\nsuite:", r"c\.yaml:10: workers\.count: the inline pool has one worker"),
        ("evaluations: 4", "evaluation: 4", r"study\.budget\.evaluation: is not a setting here\. Did you mean evaluations\?"),
    ],
)  # fmt: skip
def test_problems_across_sections(write, old, new, message):
    with pytest.raises(ConfigError, match=message):
        load_search(write(TEXT.replace(old, new)))


def test_later_problems_get_their_line(write):
    config = load_search(write(TEXT))
    error = ConfigError(
        "suite.tasks[0]: is unknown\nspace.weight.scope: is odd\nmerge method x: no field"
    )
    assert str(place_problems(error, config.origin)).replace(str(write(TEXT)), "c.yaml") == (
        "c.yaml:12: suite.tasks[0]: is unknown\n"
        "c.yaml:9: space.weight.scope: is odd\n"
        "merge method x: no field"
    )


def test_a_dict_in_a_notebook_is_the_same_config(write, tmp_path, monkeypatch):
    import yaml

    loaded = load_search(write(TEXT))
    monkeypatch.chdir(tmp_path / "configs")
    assert make_search(yaml.safe_load(TEXT)).model_dump() == loaded.model_dump()
