"""Bad input: one clear sentence, exit code 1, nothing half-written, no finished trial lost."""

import re
import shutil

import pytest
import yaml

import evomerge as api
from evomerge.cli.main import main
from evomerge.study.view import load_study
from tests.study.fakes import log_of
from tests.tiny import make_model
from tests.world import evomerge, make_world, settings, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["evomerge", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


def changed(world, name, change):
    """Write a config after a change to its data; returns the file."""
    data = settings(world, name)
    change(data)
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def broken_model(world, name, spoil):
    """Copy parent `a` and spoil its files; returns a change that uses it."""
    shutil.copytree(world / "a", world / name, dirs_exist_ok=True)
    spoil(world / name)
    return lambda data: data["models"]["parents"].update(a=str(world / name))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def widen(folder):
    make_model(9, folder, intermediate_size=64)


CASES = {
    "unknown-key": (
        lambda d: d["suite"].update(batchsize=4),
        r":\d+: suite\.batchsize: is not a setting here\. Did you mean batch_size\?",
    ),
    "missing-model": (
        lambda d: d["models"]["parents"].update(b="./nowhere"),
        r":\d+: models\.parents\.b: .*nowhere.*",
    ),
    "unknown-task": (
        lambda d: d["suite"]["tasks"][0].update(task="tiny_choise"),
        r":\d+: suite\.tasks\[0\].*tiny_choise.*tiny_choice",
    ),
    "unknown-metric": (
        lambda d: d["suite"]["tasks"][1].update(metric="exact"),
        r":\d+: suite\.tasks\[1\].*exact_match",
    ),
    "ambiguous-metric": (
        lambda d: d["suite"]["tasks"][1].update(metric="exact_match"),
        r":\d+: suite\.tasks\[1\].*exact_match,whole",
    ),
    "empty-range": (
        lambda d: d["space"]["weight"].update(search=[0.9, 0.2]),
        r":\d+: space\.weight\.search: \[0\.9, 0\.2\] is empty\. Write the smaller number first\.",
    ),
    "unknown-method": (
        lambda d: d["merge"].update(method="tise"),
        r":\d+: merge\.method: merge method 'tise' is not known\. Did you mean ties\?",
    ),
    "unknown-parameter": (
        lambda d: d["space"].update(densty={"search": [0.1, 0.2]}),
        r":\d+: space\.densty: ",
    ),
    "unknown-optimiser": (
        lambda d: d["proposer"].update(name="NGOpt"),
        r":\d+: proposer\.name: NGOpt ",
    ),
    "too-many-items": (
        lambda d: d["suite"]["items"].update(search=4000),
        r":\d+: suite\.items.*40",
    ),
    "no-search-items": (
        lambda d: d["suite"]["items"].update(search=0),
        r":\d+: suite: items\.search is 0\.",
    ),
    "ties-of-no-threshold": (
        lambda d: d["merge"].update(threshold_ties="index"),
        r":\d+: merge\.threshold_ties: came index, and task_arithmetic keeps no elements down to a "
        r"threshold\. Remove it, or take ties or breadcrumbs\.\n$",
    ),
    "ties-of-the-whole-model": (
        lambda d: d["merge"].update(
            method="ties", threshold_ties="hash", parameters={"trim_whole_model": True}
        ),
        r":\d+: merge\.threshold_ties: came hash, which counts within a tensor, and "
        r"trim_whole_model is set\. Remove one of the two\.\n$",
    ),
    "ties-of-the-whole-model-at-times": (
        lambda d: (
            d["merge"].update(method="ties", threshold_ties="hash"),
            d["space"].update(trim_whole_model={}),
        ),
        r":\d+: merge\.threshold_ties: came hash, which counts within a tensor",
    ),
    "dither-of-float32": (
        lambda d: d["merge"].update(rounding="dither"),
        r":\d+: merge\.rounding: came dither, which is for bfloat16, and tensors of this merge are "
        r"written as float32\. Set out_dtype: bfloat16, or remove it\.\n$",
    ),
    "unknown-rounding": (
        lambda d: d["merge"].update(rounding="up"),
        r":\d+: merge\.rounding: came 'up', allowed: 'nearest' or 'dither'\.",
    ),
    "no-budget": (
        lambda d: d["study"].update(budget={}),
        r":\d+: study\.budget: no limit came\.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_check_names_file_line_and_field(world, run, case):
    change, message = CASES[case]
    path = changed(world, case, change)
    code, out, err = run("check", path)
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert str(path) in err
    assert not (world / "runs" / case).exists()


BROKEN = {
    "truncated": (truncate, r"models\.parents\.a: .*model\.safetensors is 100 bytes short"),
    "garbage": (garble, r"models\.parents\.a: .*model\.safetensors"),
    "other-shapes": (
        widen,
        r"models: model\.layers\.0\.mlp\.\w+\.weight: .*\(64, 32\).*\(48, 32\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_found_before_anything_runs(world, run, case):
    spoil, message = BROKEN[case]
    path = changed(world, case, broken_model(world, f"model-{case}", spoil))
    code, _, err = run("search", path)
    assert code == 1
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not (world / "runs" / case).exists(), "nothing is written for a search that cannot begin"


def test_everything_that_is_wrong_is_said_at_once(world, run):
    def change(data):
        data["merge"]["method"] = "tise"
        data["models"]["parents"]["b"] = "./nowhere"
        data["suite"]["tasks"][0]["metric"] = "accuracy"

    code, _, err = run("check", changed(world, "many", change))
    assert code == 1
    assert all(field in err for field in ("merge.method", "models.parents.b", "suite.tasks[0]"))


def test_a_storage_that_cannot_be_written(world, run):
    (world / "a-file").write_text("in the way")
    path = changed(
        world, "unwritable", lambda d: d["study"].update(folder=str(world / "a-file" / "x"))
    )
    code, _, err = run("search", path)
    assert code == 1
    assert "study.folder: " in err
    assert "cannot be written" in err
    path = changed(world, "no-db", lambda d: d["study"].update(storage="sqlite:////nowhere/x.db"))
    code, _, err = run("search", path)
    assert code == 1
    assert "study.storage: sqlite:////nowhere/x.db cannot be opened" in err


def test_a_storage_that_fails_in_mid_search_costs_no_finished_trial(world, monkeypatch):
    """The disk fills up after some results; after room was made the search goes on."""
    import errno

    from optuna.storages.journal import JournalFileBackend

    from evomerge.errors import StudyError

    append = JournalFileBackend.append_logs
    left = [40]

    def full(self, logs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, logs)

    config = write_config(world, "full")
    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    with pytest.raises(StudyError, match=r"No space left on device.*Finished trials are safe"):
        api.search(config)
    monkeypatch.undo()
    before = log_of(load_study(config).ledger)
    finished = [entry for entry in before if entry[1] in ("done", "duplicate")]
    assert finished
    assert log_of(api.search(config, resume=True).ledger)[: len(finished)] == finished


def test_status_and_export_of_a_study_that_is_not_there(world, run):
    path = write_config(world, "never")
    for command in ("status", "export", "resume"):
        code, _, err = run(command, path)
        assert code == 1, command
        assert "study 'never'" in err


def test_wrong_usage_is_exit_code_2(run):
    assert run("search")[0] == 2
    assert run("serch", "x.yaml")[0] == 2
    assert run("export", "x.yaml", "--trial", "1", "--top", "2")[0] == 2


def test_help_is_quick_to_import_and_lists_every_command():
    import subprocess
    import sys

    code = "import sys, evomerge.cli.main; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
    text = evomerge("--help").stdout
    for command in ("check", "search", "resume", "status", "export", "merge", "eval"):
        assert f"\n  {command} " in text
