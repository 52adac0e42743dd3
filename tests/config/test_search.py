"""What only the whole config can know: names of models, where paths lead, which line a later problem belongs to."""

import pytest

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
