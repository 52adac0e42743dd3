"""Whole searches on real models, tasks, Optuna storage and files.

The same every time, and exported bit for bit.
"""

import json

import pytest
import torch
import yaml
from safetensors import safe_open

import evomerge
from evomerge.config.models import ModelRef
from evomerge.config.search import load_search
from evomerge.errors import CheckpointError, StudyError
from evomerge.study.export import export_trial
from evomerge.study.run import find_config
from evomerge.study.view import load_study
from evomerge.workers.score_model import score_model
from tests.study.fakes import log_of
from tests.world import make_world, settings, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def study(world):
    return evomerge.search(write_config(world, "reference"))


def test_the_log_is_complete(study):
    assert study.summary["state"] == "done"
    assert study.summary["trials"]["done"] == 4 + 8
    assert study.summary["examples_scored"] == 12 * 32
    names = ["base", "parent:a", "parent:b", "uniform", "greedy_soup"]
    assert list(study.summary["baselines"]) == names
    trials = study.trials
    assert trials["knob.weight.a"].notna().sum() == 8
    assert (
        trials.loc[4:, "objective"]
        == trials.loc[4:, ["task.tiny_choice", "task.tiny_answer"]].mean(axis=1)
    ).all()


def test_items_add_up_to_the_recorded_scores(study):
    items = study.items()
    metrics = {"tiny_choice": "acc,none", "tiny_answer": "exact_match,whole"}
    for task, metric in metrics.items():
        means = items[items.task == task].groupby("trial")[metric].mean()
        recorded = study.trials[f"task.{task}"].loc[means.index]
        assert means.tolist() == pytest.approx(recorded.tolist(), abs=1e-12)


def test_search_and_confirm_items_are_disjoint(study):
    search, confirm = (study.items(role) for role in ("search", "confirm"))
    for task in ("tiny_choice", "tiny_answer"):
        seen = set(search[search.task == task].item)
        assert len(seen) == 16
        assert not seen & set(confirm[confirm.task == task].item)


def test_optunas_own_tools_read_the_study(study):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    backend = JournalFileBackend(str(study.config.study.journal))
    loaded = optuna.load_study(
        study_name="reference", storage=optuna.storages.JournalStorage(backend)
    )
    assert loaded.best_value == max(t.value for t in loaded.trials)
    candidate = loaded.trials[5]
    assert set(candidate.params) == {"weight.a", "weight.b"}
    assert candidate.user_attrs["evomerge.recipe"]["merge_method"] == "task_arithmetic"
    assert candidate.user_attrs["evomerge.result"]["examples"] == 32
    assert set(optuna.importance.get_param_importances(loaded)) == {"weight.a", "weight.b"}


def test_the_same_seed_gives_the_same_recipes_and_numbers(world, study):
    again = evomerge.search(settings(world, "again"))
    assert log_of(again.ledger) == log_of(study.ledger)
    assert again.items().equals(study.items())
    digests = [r.result.digest for r in again.ledger.records]
    assert digests == [r.result.digest for r in study.ledger.records]


def test_sqlite_holds_the_same_study(world, study):
    section = settings(world, "sqlite")["study"]
    section["storage"] = f"sqlite:///{world}/study.db"
    other = evomerge.search(settings(world, "sqlite", study=section))
    assert log_of(other.ledger) == log_of(study.ledger)
    by_name = load_study("sqlite", section["storage"])
    assert log_of(by_name.ledger) == log_of(study.ledger)


METHODS = {
    "linear": {"weight": {"search": [0.0, 1.0]}},
    "ties": {"weight": {"search": [0.0, 1.0]}, "density": {"search": [0.2, 1.0]}},
    "dare_linear": {"weight": {"search": [0.0, 1.0]}, "density": {"search": [0.2, 1.0]}},
    "dare_ties": {"density": [{"search": [0.2, 1.0], "scope": "per_layer", "outside": "own"}]},
    "slerp": {"t": {"search": [0.0, 1.0], "scope": {"curve": 2}, "outside": "tied"}},
}


@pytest.mark.parametrize("method", ["task_arithmetic", *METHODS])
def test_what_was_scored_is_what_is_exported(world, study, tmp_path, method):
    if method == "task_arithmetic":
        view = study
    else:
        merge = {"method": method, "out_dtype": "bfloat16"}
        if method == "dare_ties":
            merge["parameters"] = {"weight": {"a": 0.5, "b": 0.25}}
        view = evomerge.search(
            settings(world, f"export-{method}", merge=merge, space=METHODS[method])
        )
    best = view.best
    exported = export_trial(view, best, tmp_path / "winner.yaml", tmp_path / "winner")
    assert exported.digest == best.result.digest
    assert best.result.kernels in ("native", "reference")  # what ran is recorded
    # merging the exported recipe again gives the same bytes
    assert evomerge.merge(tmp_path / "winner.yaml", tmp_path / "again") == best.result.digest
    with (
        safe_open(tmp_path / "winner/model.safetensors", "pt") as one,
        safe_open(tmp_path / "again/model.safetensors", "pt") as two,
    ):
        names = one.keys()
        assert all(torch.equal(one.get_tensor(n), two.get_tensor(n)) for n in names)
    # scoring the exported model again gives the recorded numbers exactly
    scores = score_model(ModelRef(path=str(tmp_path / "winner")), view.config.suite, "search")
    assert {t: m.value for t, m in scores.chosen.items()} == {
        t: m.value for t, m in best.result.tasks.items()
    }
    assert scores.digest == best.result.digest
    stored = view.items()
    stored = stored[stored.trial == best.number]
    for task, results in scores.items.items():
        rows = stored[stored.task == task]
        for key, column in [*results.values.items(), *results.answers.items()]:
            assert rows[key].tolist() == list(column)


def test_stock_lm_eval_gives_the_recorded_scores(study, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export_trial(study, study.best, tmp_path / "winner.yaml", tmp_path / "winner")
    suite = study.config.suite
    model = HFLM(
        pretrained=str(tmp_path / "winner"), softmax_dtype="float32", batch_size=8, device="cpu"
    )
    manager = TaskManager(include_path=list(suite.include_path), include_defaults=False)
    tasks = [task.task for task in suite.tasks]
    stock = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    ours = study.items()
    ours = ours[ours.trial == study.best.number]
    for task, metric, filter_name in (
        ("tiny_choice", "acc", "none"),
        ("tiny_choice", "acc_norm", "none"),
        ("tiny_answer", "exact_match", "first"),
        ("tiny_answer", "exact_match", "whole"),
    ):
        theirs = {
            s["doc_id"]: s[metric] for s in stock["samples"][task] if s["filter"] == filter_name
        }
        rows = ours[ours.task == task].set_index("item")[f"{metric},{filter_name}"]
        assert len(rows) == 16
        assert {i: theirs[i] for i in rows.index} == rows.to_dict()


def test_another_config_under_the_same_name_is_refused_with_what_differs(world, study):
    changed = settings(world, "reference", space={"weight": {"search": [0.0, 0.9]}})
    with pytest.raises(StudyError, match=r"made by another config: space\.weight.*0\.9") as caught:
        evomerge.search(changed, resume=True)
    assert "models" not in str(caught.value)
    reseeded = settings(world, "reference")
    reseeded["study"] = {**reseeded["study"], "seed": 6}
    with pytest.raises(StudyError, match="seed was 5, is now 6"):
        evomerge.search(reseeded, resume=True)


def test_a_study_is_never_started_over_an_old_one(world, study):
    with pytest.raises(StudyError, match="exists already with 13 trials"):
        evomerge.search(settings(world, "reference"))


def test_nan_in_a_parent_is_a_failed_trial_never_a_score(world, tmp_path):
    from safetensors.torch import load_file, save_file

    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    for file in (world / "a").iterdir():
        (poisoned / file.name).write_bytes(file.read_bytes())
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, poisoned / "model.safetensors", {"format": "pt"})
    models = {"base": str(world / "base"), "parents": {"a": str(poisoned), "b": str(world / "b")}}
    with pytest.raises(StudyError, match=r"parent:a cannot be scored \(.*up_proj.*NaN or Inf"):
        evomerge.search(settings(world, "nan", models=models))


def test_a_full_disk_during_export_leaves_nothing(world, study, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="free"):
        export_trial(study, study.best, tmp_path / "winner.yaml", tmp_path / "winner")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_the_scored_ones_are_not_exported(world, tmp_path):
    changed = make_world(tmp_path / "other")
    view = evomerge.search(settings(changed, "moved"))
    target = changed / "a" / "model.safetensors"
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(StudyError, match="nothing was exported"):
        export_trial(view, view.best, tmp_path / "w.yaml", tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assert not (tmp_path / "w.yaml").exists()
    with pytest.raises(StudyError, match=r"models\.a\.fingerprint was"):
        evomerge.search(settings(changed, "moved"), resume=True)


def test_exported_yaml_is_mergekits_and_holds_the_exact_numbers(study, tmp_path):
    export_trial(study, study.best, tmp_path / "winner.yaml", None)
    data = yaml.safe_load((tmp_path / "winner.yaml").read_text())
    assert data["merge_method"] == "task_arithmetic"
    assert data["base_model"] == str(study.config.models.base)
    weights = {m["model"]: m["parameters"]["weight"] for m in data["models"]}
    assert weights == {
        str(ref): study.best.values[f"weight.{name}"]
        for name, ref in study.config.models.parents.items()
    }
    assert (data["dtype"], data["out_dtype"]) == ("float32", "float32")


def test_a_config_survives_its_round_trip_through_the_storage(world):
    from evomerge.config.search import make_search

    config = load_search(
        write_config(world, "trip", space={"weight": {"scope": {"every": 1}, "outside": "own"}})
    )
    again = make_search(json.loads(config.model_dump_json(by_alias=True)))
    assert again.model_dump() == config.model_dump()
    assert again.space == config.space


def test_studies_in_one_folder_never_mix_results_of_other_items_or_models(world, study):
    other = settings(world, "reference")
    other["study"] = {**other["study"], "name": "other-items"}
    other["suite"] = {**other["suite"], "items": {"search": 16, "confirm": 8, "seed": 9}}
    second = evomerge.search(other)
    drawn = {name: set(v.items().item) for name, v in (("first", study), ("second", second))}
    assert drawn["first"] != drawn["second"]
    other["study"] = {**other["study"], "name": "alone", "folder": str(world / "runs" / "alone")}
    alone = evomerge.search(other)
    assert log_of(second.ledger) == log_of(alone.ledger)
    assert second.items().equals(alone.items())


def test_a_moved_study_goes_on_where_it_is_now_and_with_changed_settings(world, tmp_path):
    import shutil

    view = evomerge.search(settings(world, "to-move"))
    before = log_of(view.ledger)
    shutil.move(world / "runs" / "to-move", tmp_path / "moved")
    journal = tmp_path / "moved" / "journal.log"
    config = find_config("to-move", str(journal), ["study.budget.evaluations=12"])
    assert config.study.folder == str(tmp_path / "moved")
    after = log_of(evomerge.search(config, resume=True).ledger)
    assert after[:13] == before
    assert len(after) == 17
    assert not (world / "runs" / "to-move").exists()


def test_a_study_of_another_program_is_left_alone(world, tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    data = settings(world, "foreign")
    data["study"]["storage"] = str(tmp_path / "shared.log")
    storage = optuna.storages.JournalStorage(JournalFileBackend(data["study"]["storage"]))
    foreign = optuna.create_study(storage=storage, study_name="foreign")
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    content = (tmp_path / "shared.log").read_bytes()
    with pytest.raises(StudyError, match="trial 0 of this study was not made by evomerge"):
        evomerge.search(data)
    assert (tmp_path / "shared.log").read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"my precious notes", b"SQLite format 3\0 no line end", b"[1]\n2"]
)
def test_a_file_that_is_no_journal_is_left_as_it_is(world, tmp_path, content):
    data = settings(world, "precious")
    data["study"]["storage"] = str(tmp_path / "file")
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StudyError, match="is not an Optuna journal"):
        evomerge.search(data)
    assert (tmp_path / "file").read_bytes() == content


def test_a_torn_last_line_of_the_journal_is_cut_and_the_search_goes_on(world):
    view = evomerge.search(settings(world, "torn"))
    journal = view.config.study.journal
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"trial_')
    data = settings(world, "torn")
    data["study"] = {**data["study"], "budget": {"evaluations": 12}}
    after = log_of(evomerge.search(data, resume=True).ledger)
    assert after[:13] == log_of(view.ledger)
    assert len(after) == 17
