"""Leakage: what chose the winner must not judge it, and published test splits choose nobody."""

import functools
import json

import pytest
from lm_eval.tasks import TaskManager

from evomerge.errors import ConfigError
from evomerge.evaluate import catalog
from evomerge.evaluate.leakage import benchmark_of
from evomerge.evaluate.tasks import load_tasks
from tests.evaluate.helpers import ANSWER, CHOICE, make_suite, rewrite
from tests.tiny import write_tasks


@pytest.fixture(autouse=True)
def _without_the_collection_of_lm_eval(monkeypatch):
    local = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(catalog, "TaskManager", local)


@pytest.mark.parametrize(
    ("task", "data", "benchmark"),
    [
        ("gsm8k", "openai/gsm8k", "gsm8k"),
        ("gsm8k_cot_llama", "gsm8k", "gsm8k"),
        ("leaderboard_gpqa_main", "Idavidrein/gpqa", "gpqa"),
        ("arc_challenge", "allenai/ai2_arc", "arc"),
        ("tinyHellaswag", "tinyBenchmarks/tinyHellaswag", "hellaswag"),
        ("MMLU_anatomy", "cais/mmlu", "mmlu"),
        ("my_sums", "me/gsm8k", "gsm8k"),
        ("global_mmlu_de", "CohereForAI/Global-MMLU-Lite", "mmlu"),
        ("super_glue_rte", "super_glue", "rte"),
        # names that only begin alike
        ("racecar", "json", None),
        ("arcade", "json", None),
        ("mathematics_of_ours", "json", None),
        ("zoo_reverse", "json", None),
    ],
)
def test_benchmarks_are_known_by_their_tasks_and_their_data(task, data, benchmark):
    assert benchmark_of(task, data) == benchmark


def as_benchmark(tmp_path):
    """The tiny task of choices under the name of a benchmark."""
    return rewrite(tmp_path, "tiny_choice.yaml", ("task: tiny_choice", "task: gsm8k_tiny"))


BENCHMARK = {"task": "gsm8k_tiny", "metric": "acc"}
NEVER_ON_TRAIN = {
    "search": {"count": 4, "split": "train"},
    "confirm": {"count": 4, "split": "train"},
}


def refusals(suite):
    with pytest.raises(ConfigError) as caught:
        load_tasks(suite)
    return str(caught.value).splitlines()


def test_a_benchmarks_own_test_split_is_refused(tmp_path):
    suite = make_suite(as_benchmark(tmp_path), BENCHMARK)
    assert refusals(suite) == [
        "suite.tasks[0]: task 'gsm8k_tiny': search and confirm would choose the winner on 20 items "
        "of split 'test', on which scores of gsm8k are published. Give suite.items.search.split "
        "and suite.items.confirm.split another split; it has train, or set suite.leakage: allow, "
        "and the study will say so."
    ]


def test_a_benchmark_may_judge_on_its_test_split(tmp_path):
    """Report items choose nobody; nor is anything said of a search on the training split."""
    items = {**NEVER_ON_TRAIN, "report": {"count": 10, "split": "test"}}
    suite = load_tasks(make_suite(as_benchmark(tmp_path), BENCHMARK, items=items, chunks=1))
    assert suite.leakage == ()
    assert len(suite.items("report")["gsm8k_tiny"]) == 10


def test_what_is_allowed_is_said(tmp_path):
    suite = load_tasks(make_suite(as_benchmark(tmp_path), BENCHMARK, leakage="allow"))
    assert suite.leakage == (
        "task 'gsm8k_tiny': search and confirm would choose the winner on 20 items of split "
        "'test', on which scores of gsm8k are published.",
    )


def with_copies(tmp_path, change=lambda document: document):
    """Training documents 0 to 2, changed, among those of the test split."""
    folder = write_tasks(tmp_path)
    train = [json.loads(x) for x in (tmp_path / "choice_train.jsonl").read_text().splitlines()]
    with (tmp_path / "choice_test.jsonl").open("a") as file:
        for document in train[:3]:
            file.write(json.dumps(change({**document, "id": 90 + document["id"]})) + "\n")
    return folder


def shared_items(folder):
    items = {"search": {"count": None, "split": "train"}, "confirm": {"count": None}}
    suite = make_suite(folder, CHOICE, items=items, leakage="allow", chunks=1)
    return load_tasks(suite).leakage


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document,
        lambda document: {**document, "text": document["text"].upper()},
        lambda document: {**document, "text": document["text"].replace(" ", "  ") + " "},
    ],
    ids=["copy", "capitals", "blanks"],
)
def test_nearly_equal_documents_are_one_item(tmp_path, change):
    (sentence,) = shared_items(with_copies(tmp_path, change))
    assert "search (split 'train') and confirm (split 'test') have 3 items in common" in sentence


def test_documents_in_other_words_are_other_items(tmp_path):
    folder = with_copies(tmp_path, lambda document: {**document, "question": "what else"})
    assert shared_items(folder) == ()


def test_items_that_two_tasks_share_are_found(tmp_path):
    """A task under two names: what one searches on, the other confirms on."""
    folder = write_tasks(tmp_path)
    text = (tmp_path / "tiny_choice.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text.replace("task: tiny_choice", "task: again"))
    suite = make_suite(
        folder, CHOICE, {**CHOICE, "task": "again"}, items={"search": 12, "confirm": 12}
    )
    found = refusals(suite)
    assert found
    assert all("items in common" in line and "leave one of the tasks out" in line for line in found)
    alone = load_tasks(make_suite(folder, CHOICE, ANSWER, items={"search": 12, "confirm": 12}))
    assert alone.leakage == ()


def test_later_confirmations_get_what_no_earlier_one_had(tmp_path):
    """Copies of a used document count as used; search items stay as they were."""
    folder = write_tasks(tmp_path)
    items = {"search": 8, "confirm": 5, "report": 3}
    config = make_suite(folder, CHOICE, items=items)
    first = load_tasks(config)
    used = first.drawn(("confirm", "report"))
    second = load_tasks(config, used)
    assert second.items("search") == first.items("search")
    for role in ("confirm", "report"):
        ids = second.items(role)["tiny_choice"]
        assert len(ids) == items[role]
        assert not set(ids) & set(used["tiny_choice"]["test"])
    assert not set(second.items("confirm")["tiny_choice"]) & set(
        second.items("report")["tiny_choice"]
    )
    both = second.drawn(("confirm", "report"))["tiny_choice"]["test"]
    third = load_tasks(config, {"tiny_choice": {"test": [*used["tiny_choice"]["test"], *both]}})
    assert third.items("search") == first.items("search")
    assert (third.chunks("confirm"), third.chunks("report")) == ((), ()), "24 less 8 and twice 8"


def test_fresh_items_of_one_task_alone_confirm_nothing(tmp_path):
    """Task 0 has none left: no chunk of confirm items for any, since all count in the objective."""
    config = make_suite(write_tasks(tmp_path), CHOICE, ANSWER, items={"search": 12, "confirm": 8})
    used = {"tiny_choice": load_tasks(config).drawn(("confirm",))["tiny_choice"]}
    again = load_tasks(config, used)
    assert again.chunks("confirm") == ()
    assert len(again.chunks("search")) == 3
