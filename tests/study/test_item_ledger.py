"""Everything a study reports follows from its stored items and the tasks alone, bit for bit."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import evomerge
from evomerge.config.models import ModelRef
from evomerge.evaluate.evaluator import join_results
from evomerge.evaluate.flags import flags_of, rates_of
from evomerge.evaluate.plain import plain
from evomerge.evaluate.tasks import load_tasks
from evomerge.study.items import ItemStore
from evomerge.study.setup import prepare
from evomerge.workers.live_model import load_live_model
from evomerge.workers.score_model import score_model
from tests.evaluate.helpers import make_suite, run_stock
from tests.tiny import make_tokenizer
from tests.world import make_world, settings, write_config

METRICS = """
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}"""
CHOSEN = {"tiny_choice": "mcc,none", "tiny_answer": "chrf,whole", "tiny_text": "bits_per_byte,none"}
GROUP = {
    "group": "tiny_group",
    "task": ["tiny_choice", "tiny_second"],
    "aggregate_metric_list": [
        {"metric": "acc", "aggregation": "mean", "weight_by_size": True},
        {"metric": "acc_norm", "aggregation": "mean", "weight_by_size": False},
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    path = folder / "tasks" / "tiny_choice.yaml"
    text = path.read_text()
    line = "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}"
    assert line in text
    path.write_text(text.replace(line, METRICS.removeprefix("\n")))
    return folder


@pytest.fixture(scope="module")
def config(world):
    data = settings(world, "ledger")
    data["study"]["budget"] = {"evaluations": 4}
    suite = {
        **data["suite"],
        "tasks": [
            {"task": "tiny_choice", "metric": "mcc"},
            {"task": "tiny_answer", "metric": "chrf,whole"},
            {"task": "tiny_text", "metric": "bits_per_byte"},
        ],
        "chunks": 3,
    }
    return write_config(world, "ledger", study=data["study"], suite=suite)


@pytest.fixture(scope="module")
def study(config):
    return evomerge.search(config)


@pytest.fixture(scope="module")
def setup(study):
    return prepare(study.config)


@pytest.fixture(scope="module")
def stored(study):
    """What is in the files: (recipe's hash, role) → results per item."""
    (folder,) = (folder for folder in (study.config.study.journal.parent / "items").iterdir())
    store = ItemStore(folder)
    return lambda recipe, role: join_results(
        [chunk.result for chunk in store.read(recipe.hash, role).values()]
    )


def scored(study):
    return [r for r in study.ledger.records if r.result and r.state == "done"]


def test_every_recorded_score_follows_from_the_files(study, setup, stored):
    parents = [r.result.tasks for r in study.ledger.baselines.values() if r.is_parent]
    for record in scored(study):
        metrics = setup.tasks.aggregate(stored(record.recipe, "search"))
        assert {task: metrics[task][key] for task, key in CHOSEN.items()} == record.result.tasks
        score = setup.score_of({t: metrics[t][key] for t, key in CHOSEN.items()}, parents)
        assert (score.value, score.stderr) == (record.result.fitness, record.result.stderr)


def test_every_confirmed_score_follows_from_the_files(study, setup, stored):
    confirmed = study.summary["confirm"]
    assert "winner" in confirmed
    for scores in confirmed.values():
        items = stored(study.trial(scores["trial"]).recipe, "confirm")
        metrics = setup.tasks.aggregate(items)
        assert {task: metrics[task][key].value for task, key in CHOSEN.items()} == scores["tasks"]


@pytest.mark.parametrize("role", ["search", "confirm"])
def test_every_metric_equals_that_of_a_fresh_evaluation(study, stored, role):
    recipe = study.best.recipe
    fresh = score_model(recipe, study.config.suite, role)
    assert stored(recipe, role) == fresh.items
    assert load_tasks(study.config.suite).aggregate(stored(recipe, role)) == fresh.metrics
    assert {"acc,none", "acc_norm,none", "mcc,none", "brier_score,none"} <= set(
        fresh.metrics["tiny_choice"]
    )
    assert {"exact_match,first", "exact_match,last", "chrf,whole"} <= set(
        fresh.metrics["tiny_answer"]
    )


def test_metrics_of_choices_follow_from_the_loglikelihoods_alone(study, stored, setup):
    (task,) = (t for t in setup.tasks.tasks if t.name == "tiny_choice")
    documents = list(task.roles["search"].task.eval_docs)
    for record in scored(study):
        items = stored(record.recipe, "search")["tiny_choice"]
        for row, i in enumerate(items.ids):
            totals = np.array(items.answers["loglikelihoods"][row])
            gold, choices = documents[i]["answer"], documents[i]["choices"]
            lengths = np.array([len(choice) for choice in choices])
            assert items.values["acc,none"][row] == (totals.argmax() == gold)
            assert items.values["acc_norm,none"][row] == ((totals / lengths).argmax() == gold)
            shares = np.exp(totals - totals.max())
            assert items.values["brier_score,none"][row][1] == (shares / shares.sum()).tolist()
            # lm-eval's own code says the same of every metric, none left out
            answers = list(zip(totals, items.answers["greedy"][row], strict=True))
            again = task.roles["search"].task.process_results(documents[i], answers)
            for metric, value in again.items():
                found = items.values[f"{metric},none"][row]
                assert plain(value) == found


def test_metrics_of_words_follow_from_the_texts_alone(study, stored, setup):
    (task,) = (t for t in setup.tasks.tasks if t.name == "tiny_answer")
    reading = task.roles["confirm"].task
    documents = list(reading.eval_docs)
    items = stored(study.best.recipe, "confirm")["tiny_answer"]
    for row, i in enumerate(items.ids):
        letters = [c for c in items.answers["text"][row] if "a" <= c <= "z"]
        half = ("low" if letters[0] < "n" else "high") if letters else "none"
        right = half == documents[i]["answer"]
        assert items.values["exact_match,first"][row] == right
        assert items.answers["extraction_failed,first"][row] == (not letters)


def test_a_groups_score_follows_from_the_items_of_its_tasks(world, tmp_path):
    # lm-eval weights a group's tasks by the items that were scored, or not at all
    second = (
        (world / "tasks" / "tiny_choice.yaml").read_text().replace("tiny_choice", "tiny_second")
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    for path in (world / "tasks").iterdir():
        (folder / path.name).write_text(path.read_text())
    lines = (folder / "choice_test.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[5:18]))
    few = second.replace(f"{world}/tasks/choice_test.jsonl", str(folder / "few.jsonl"))
    assert few != second
    (folder / "tiny_second.yaml").write_text(few)
    (folder / "tiny_group.yaml").write_text(yaml.safe_dump(GROUP))
    tasks = [{"task": task, "metric": "acc"} for task in GROUP["task"]]
    suite = make_suite(
        str(folder), *tasks, items={"search": {"count": None}, "confirm": 0}, chunks=1
    )
    found = score_model(ModelRef(path=str(world / "a")), suite, "search")
    model = load_live_model(world / "a", torch.float32, None, "cpu")
    stock = run_stock(str(folder), model, make_tokenizer(), ["tiny_group"])
    for metric, weighted in (("acc,none", True), ("acc_norm,none", False)):
        columns = [found.items[task].values[metric] for task in GROUP["task"]]
        sizes = [len(column) if weighted else 1 for column in columns]
        means = [sum(column) / len(column) for column in columns]
        group = sum(m * s for m, s in zip(means, sizes, strict=True)) / sum(sizes)
        assert stock["groups"]["tiny_group"][metric] == group


def test_the_frame_holds_what_the_files_hold(study, stored):
    frame = study.items(None)
    assert list(frame.columns[:4]) == ["trial", "role", "task", "item"]
    assert not frame.duplicated(["trial", "role", "task", "item"]).any()
    rows = 0
    for record in scored(study):
        for role in ("search", "confirm"):
            for task, items in stored(record.recipe, role).items():
                part = frame[
                    (frame.trial == record.number) & (frame.role == role) & (frame.task == task)
                ]
                rows += len(part)
                assert part["item"].tolist() == list(items.ids)
                columns = {**items.values, **items.answers}
                for name, column in columns.items():
                    assert part[name].tolist() == list(column)
                for name in set(frame.columns[4:]) - set(columns):
                    assert part[name].isna().all()
    assert rows == len(frame)
    searched = frame[frame.role == "search"].drop(columns="text").reset_index(drop=True)
    assert study.items().equals(searched)
    choice = study.items()[study.items().task == "tiny_choice"]
    right = choice.chosen == choice.gold
    assert right.astype(float).tolist() == choice["acc,none"].tolist()
    assert np.stack(choice.loglikelihoods).shape == (len(choice), 4)
    assert str(frame.truncated.dtype) == "boolean"
    assert str(frame.length.dtype) == "Int64"


def test_rates_are_shares_of_flags(study, stored, setup):
    rates = study.rates("confirm")
    trial = study.best.number
    result = stored(study.best.recipe, "confirm")
    found = rates_of(result, setup.tasks.scored)
    assert set(found) == {"tiny_answer"}
    flags = flags_of(result, setup.tasks.scored)
    for flag, column in (
        ("truncated", "truncated"),
        ("empty", "empty"),
        ("extraction failed", "extraction_failed,whole"),
    ):
        share = rates.loc[(trial, "confirm", "tiny_answer"), column]
        assert share == found["tiny_answer"][flag] == sum(flags[flag]) / len(flags[flag])
    assert rates["truncated"].max() > 0
    assert pd.isna(rates.loc[(trial, "confirm", "tiny_choice"), "truncated"])
    assert rates.loc[(trial, "confirm", "tiny_choice"), "prompt_truncated"] == 0
