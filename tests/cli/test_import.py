"""`evomerge import` on real folders: what it prints is a config that would run."""

import pytest
from click.testing import CliRunner

from evomerge.cli.main import cli
from evomerge.config.search import load_search
from evomerge.errors import ConfigError, EvoMergeError
from evomerge.study.setup import prepare
from tests.world import make_world

GENOME = """
genome:
  models: [base, a, ./b]
  merge_method: dare_ties
  base_model: base
  tokenizer_source: base
  layer_granularity: 1
  filters: [self_attn, lm_head]
tasks:
  - {name: tiny_choice, weight: 2, metric: "acc_norm,none"}
  - {name: tiny_answer, metric: "exact_match,last"}
  - {name: tiny_text, weight: -0.1, metric: "bits_per_byte,none"}
limit: 10
num_fewshot: 0
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Import a genome file in the folder of the models."""
    monkeypatch.chdir(world)

    def run_import(text, *options):
        path = tmp_path / "night.yml"
        path.write_text(text)
        arguments = ["import", str(path), "--include-path", "tasks", *map(str, options)]
        return CliRunner().invoke(cli, arguments, standalone_mode=False)

    return run_import


def test_the_printed_config_passes_every_check(run, world, tmp_path, monkeypatch):
    out = tmp_path / "elsewhere" / "night.yaml"
    out.parent.mkdir()
    result = run(GENOME, "--out", out, "--evaluations", 12, "--seconds", 90)
    assert result.exit_code == 0, result.exception
    assert f"evomerge check {out}" in result.output
    monkeypatch.chdir("/")
    setup = prepare(load_search(out))
    assert setup.config.study.name == "night"
    assert setup.config.study.budget.evaluations == 12
    assert setup.config.study.budget.seconds == 90.0
    assert setup.folders == {name: world / name for name in ("base", "a", "b")}
    assert setup.out_dtype == "bfloat16"
    assert [knob.name for knob in setup.space.knobs if knob.name.startswith("weight.b")] == [
        "weight.b.self_attn.layer_0",
        "weight.b.self_attn.layer_1",
        "weight.b.lm_head",
        "weight.b.layer_0",
        "weight.b.layer_1",
    ]
    assert {k.value(u) for k, u in zip(setup.space.knobs, setup.space.initial, strict=True)} == {
        0.333333,
        1.0,
    }
    assert [(t.name, t.metric, t.weight) for t in setup.tasks.scored] == [
        ("tiny_choice", "acc_norm,none", 2.0),
        ("tiny_answer", "exact_match,last", 1.0),
        ("tiny_text", "bits_per_byte,none", 0.1),
    ]
    assert [task.higher_is_better for task in setup.tasks.scored] == [True, True, False]
    assert {len(ids) for ids in setup.tasks.items("search").values()} == {10}


def test_every_method_passes_every_check(run, tmp_path):
    rest = GENOME[GENOME.index("tasks:") :]
    genomes = {
        "linear": "{models: [a, b], merge_method: linear}",
        "slerp": "{models: [a, b], merge_method: slerp, layer_granularity: 1}",
        "smooth": "{models: [a, b], merge_method: ties, base_model: base, layer_granularity: 1, "
        "smooth: true, allow_negative_weights: true}",
    }
    sizes = {}
    for name, genome in genomes.items():
        out = tmp_path / f"{name}.yaml"
        base = ["--base", "base"] if name == "linear" else []
        result = run(f"genome: {genome}\n{rest}", "--out", out, *base)
        assert result.exit_code == 0, result.exception
        sizes[name] = prepare(load_search(out)).space.size
    assert sizes == {"linear": 2, "slerp": 2, "smooth": 8}


def test_stdout_holds_the_config_and_nothing_else(run, tmp_path):
    result = run(GENOME)
    (tmp_path / "c.yaml").write_text(result.stdout)
    assert load_search(tmp_path / "c.yaml").study.name == "night"
    assert result.stdout.startswith("# By evomerge import")


def test_a_tokenizer_is_found_by_its_path(run, tmp_path):
    text = GENOME.replace("tokenizer_source: base", "tokenizer_source: ./a")
    (tmp_path / "c.yaml").write_text(run(text).stdout)
    assert load_search(tmp_path / "c.yaml").merge.tokenizer == "a"


def test_nothing_is_written_over(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    result = run(GENOME, "--out", tmp_path / "mine.yaml")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).endswith("is already there. Name another file with --out.")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filters:", "filter:", "genome.filter: is not a setting here. Did you mean filters?"),
        ("limit: 10", "limit: 0", "limit: came 0, allowed is at least 1."),
        ("tiny_answer", "tiny_choice", "task 'tiny_choice' stands twice"),
        ("num_fewshot", "num_fewshots", "Did you mean num_fewshot?"),
        ("[base, a", "[./nowhere, a", "nowhere: there is no such folder."),
    ],
)
def test_bad_input_is_a_sentence(run, old, new, message):
    result = run(GENOME.replace(old, new, 1))
    assert isinstance(result.exception, EvoMergeError)
    assert message in str(result.exception)


def test_models_of_the_hub_need_their_depth_and_no_network(run):
    text = GENOME.replace("[base, a, ./b]", "[org/a, org/b]")
    refused = run(text)
    assert "Give it with --layers." in str(refused.exception)
    assert "org/b" in run(text, "--layers", 2).stdout
