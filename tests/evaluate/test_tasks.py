"""Loading and checking tasks: every message, roles, chunks, aggregation."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from evomerge.errors import ConfigError, EvaluationError, NonFiniteError
from evomerge.evaluate import catalog
from evomerge.evaluate.evaluator import TaskItems
from evomerge.evaluate.tasks import load_tasks
from tests.evaluate.helpers import ANSWER, CHOICE, TEXT, make_suite, rewrite
from tests.tiny import write_tasks


@pytest.fixture(autouse=True)
def _without_the_collection_of_lm_eval(request, monkeypatch):
    # its index takes 8 seconds; one slow test has it
    if "slow" not in request.keywords:
        local = functools.partial(TaskManager, include_defaults=False)
        monkeypatch.setattr(catalog, "TaskManager", local)


def problems(folder, *tasks, **settings):
    with pytest.raises(ConfigError) as caught:
        load_tasks(make_suite(folder, *tasks, **settings))
    return str(caught.value).splitlines()


def test_unknown_task(folder):
    assert problems(folder, {**CHOICE, "task": "tiny_chioce"}) == [
        "suite.tasks[0]: no task is called 'tiny_chioce'. Did you mean tiny_choice?"
    ]
    assert problems(folder, {**CHOICE, "task": "hellaswag"}) == [
        "suite.tasks[0]: no task is called 'hellaswag'. Known: tiny_answer, tiny_choice, tiny_text."
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = rewrite(tmp_path, "tiny_choice.yaml", ("output_type", "  output_type"))
    unknown, unread = problems(folder, CHOICE)
    assert unknown.startswith("suite.tasks[0]: no task is called 'tiny_choice'.")
    assert unread.startswith(
        f"suite.include_path: {folder}/tiny_choice.yaml cannot be read (ScannerError: "
    )
    assert "line 9" in unread


def test_groups_and_tags_are_written_out(tmp_path):
    folder = rewrite(
        tmp_path, "tiny_choice.yaml", ("task: tiny_choice", "task: tiny_choice\ntag: easy")
    )
    inner = "group: inner\ntask: [tiny_text]\n"
    (tmp_path / "inner.yaml").write_text(inner)
    (tmp_path / "all.yaml").write_text(
        "group: all\ntask: [easy, inner, {task: tiny_answer, num_fewshot: 1}]\n"
    )
    assert problems(folder, {**CHOICE, "task": "all"}, {**CHOICE, "task": "easy"}) == [
        "suite.tasks[0]: 'all' is a group of tasks. Write out those that are meant: tiny_choice, "
        "tiny_text, tiny_answer.",
        "suite.tasks[1]: 'easy' is a tag of tasks. Write out those that are meant: tiny_choice.",
    ]


def test_unknown_metrics(folder):
    assert problems(folder, {**CHOICE, "metric": "f1"}, {**ANSWER, "metric": "exact_match"}) == [
        "suite.tasks[0].metric: task 'tiny_choice' has no metric 'f1'. It has acc,none, "
        "acc_norm,none.",
        "suite.tasks[1].metric: task 'tiny_answer' has exact_match more than once: "
        "exact_match,first, exact_match,last, exact_match,whole. Write which.",
    ]


def test_short_and_full_metric_keys(folder):
    suite = load_tasks(make_suite(folder, CHOICE, ANSWER, {**TEXT, "metric": "bits_per_byte,none"}))
    assert [task.metric for task in suite.scored] == [
        "acc,none",
        "exact_match,first",
        "bits_per_byte,none",
    ]
    assert [task.higher_is_better for task in suite.scored] == [True, True, False]


def test_what_an_objective_is_told(folder):
    task = {**TEXT, "higher_is_better": True, "weight": 2.0, "floor": 0.1}
    (told,) = load_tasks(make_suite(folder, task)).scored
    assert (told.name, told.metric) == ("tiny_text", "byte_perplexity,none")
    assert (told.higher_is_better, told.weight, told.floor) == (True, 2.0, 0.1)


def test_a_metric_of_unknown_direction(tmp_path):
    folder = rewrite(
        tmp_path,
        "tiny_choice.yaml",
        ("aggregation: mean, higher_is_better: true", "aggregation: mean, higher_is_better: null"),
    )
    assert problems(folder, CHOICE) == [
        "suite.tasks[0].higher_is_better: lm-eval does not know whether more acc,none is better. "
        "Set it to true or false."
    ]
    (told,) = load_tasks(make_suite(folder, {**CHOICE, "higher_is_better": False})).scored
    assert told.higher_is_better is False


def test_unknown_split_and_field(folder):
    items = {"search": {"count": 4, "split": "tset"}, "confirm": 4, "stratify": "subjet"}
    assert problems(folder, CHOICE, items=items) == [
        "suite.items.search.split: task 'tiny_choice' has no split 'tset'. It has train, test.",
        "suite.items.stratify: the documents of task 'tiny_choice' have no field 'subjet'. Did you "
        "mean subject?",
    ]


def test_too_few_items(folder):
    assert problems(folder, CHOICE, items={"search": 20, "confirm": 5}) == [
        "suite.items: task 'tiny_choice' has 24 items in split 'test', search 20 + confirm 5 are "
        "asked for. Lower a count, or give a role another split."
    ]
    assert problems(folder, CHOICE, items={"search": 24, "confirm": {"count": None}}) == [
        "suite.items: task 'tiny_choice' has 24 items in split 'test', search 24 + confirm the "
        "rest are asked for. Lower a count, or give a role another split."
    ]
    both = {"search": {"count": None}, "confirm": {"count": None}}
    assert problems(folder, CHOICE, items=both) == [
        "suite.items: search and confirm both take all that is left of split 'test' of task "
        "'tiny_choice'. Give one of them a count or another split."
    ]


def test_the_same_document_in_two_splits_is_leakage(tmp_path):
    folder = write_tasks(tmp_path)
    train = (tmp_path / "choice_train.jsonl").read_text().splitlines()
    with (tmp_path / "choice_test.jsonl").open("a") as file:
        file.write("\n".join(train[:3]).replace('"id": ', '"id": 9') + "\n")
    items = {"search": {"count": None, "split": "train"}, "confirm": {"count": None}}
    assert problems(folder, CHOICE, items=items) == [
        "suite.tasks[0]: task 'tiny_choice': search (split 'train') and confirm (split 'test') have "
        "3 items in common, e.g. items 0 and 24. Draw both from one split, which leaves copies out, "
        "or remove them from the data, or set suite.leakage: allow, and the study will say so."
    ]


def test_copies_within_a_split_never_have_two_roles(tmp_path):
    folder = write_tasks(tmp_path)
    file = tmp_path / "answer_test.jsonl"
    file.write_text(file.read_text() * 2)
    suite = load_tasks(make_suite(folder, ANSWER, items={"search": 12, "confirm": {"count": None}}))
    drawn = [i for role in ("search", "confirm") for i in suite.items(role)["tiny_answer"]]
    assert sorted(drawn) == list(range(24))
    message = (
        "has 24 items in split 'test' (without 24 copies of other documents), search 20 + confirm 5"
    )
    assert message in problems(folder, ANSWER, items={"search": 20, "confirm": 5})[0]
    # a role that has the split to itself takes it as it is
    alone = make_suite(folder, ANSWER, items={"search": {"count": None}, "confirm": 0})
    assert len(load_tasks(alone).items("search")["tiny_answer"]) == 48


def test_one_more_example_is_needed_where_the_question_is_among_them(folder):
    def of(number):
        items = {"search": {"count": 4, "split": "train"}, "confirm": 0}
        return make_suite(folder, {**CHOICE, "num_fewshot": number}, items=items)

    assert load_tasks(of(7)).items("search")
    with pytest.raises(ConfigError, match=r"num_fewshot: .* has 7 examples to show, 8 are asked"):
        load_tasks(of(8))


def test_generation_arguments(folder):
    def of(**arguments):
        return problems(folder, {**ANSWER, "generation": arguments})

    assert of(max_gen_tok=3, until=3, max_gen_toks=0.5, do_sample=1, temperature="hot") == [
        "suite.tasks[0].generation.max_gen_tok: no generation argument is called so. Did you mean "
        "max_gen_toks?",
        "suite.tasks[0].generation.until: came 3, a text or a list of texts is needed.",
        "suite.tasks[0].generation.max_gen_toks: came 0.5, a whole number of at least 1 is needed.",
        "suite.tasks[0].generation.do_sample: came 1, true or false is needed.",
        "suite.tasks[0].generation.temperature: came 'hot', a number of at least 0 is needed.",
        "suite.tasks[0].generation: task 'tiny_answer' draws its answers at random; only greedy "
        "decoding is offered. Set do_sample: false and temperature: 0.",
    ]
    assert "draws its answers at random" in of(temperature=0.7)[0]
    assert "draws its answers at random" in of(do_sample=True)[0]
    assert "beam search; only greedy" in of(num_beams=2)[0]
    assert "is called so. Known are until, max_gen_toks and transformers' own." in of(zzz=1)[0]
    assert problems(folder, {**CHOICE, "generation": {"until": "x"}}) == [
        "suite.tasks[0].generation: task 'tiny_choice' compares log-likelihoods and generates "
        "nothing. Leave generation out."
    ]


def test_settings_are_put_on_the_task(folder):
    changed = {**ANSWER, "num_fewshot": 3, "generation": {"max_gen_toks": 5}}
    config = load_tasks(make_suite(folder, changed)).tasks[0].task.config
    assert config.num_fewshot == 3
    assert config.generation_kwargs == {"until": ["\n", "."], "do_sample": False, "max_gen_toks": 5}


def test_few_shot_numbers(folder, tmp_path):
    assert problems(folder, {**CHOICE, "num_fewshot": 9}) == [
        "suite.tasks[0].num_fewshot: task 'tiny_choice' has 8 examples to show, 9 are asked for. "
        "Lower it."
    ]
    fixed = rewrite(tmp_path, "tiny_choice.yaml", ("test_split", "num_fewshot: 0\ntest_split"))
    assert problems(fixed, {**CHOICE, "num_fewshot": 1}) == [
        "suite.tasks[0].num_fewshot: task 'tiny_choice' is fixed to 0 examples by its own file, "
        "which lm-eval never overrides. Leave num_fewshot out."
    ]
    assert load_tasks(make_suite(fixed, CHOICE)).tasks[0].task.config.num_fewshot == 0


def test_missing_folder(folder):
    found = problems([folder, "/nowhere"], CHOICE)
    assert found == [
        "suite.include_path[1]: '/nowhere' is not a folder. Give the folder that holds the task "
        "YAML files."
    ]


def test_data_that_cannot_be_loaded(tmp_path):
    folder = rewrite(tmp_path, "tiny_choice.yaml", ("choice_test.jsonl", "missing.jsonl"))
    (line,) = problems(folder, CHOICE)
    assert line.startswith(
        "suite.tasks[0]: task 'tiny_choice' cannot be loaded (FileNotFoundError: "
    )
    assert line.endswith("Mend its YAML or its data files.")


def test_data_on_the_hub_without_a_network(tmp_path):
    text = (Path(write_tasks(tmp_path)) / "tiny_text.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("dataset_kwargs")]
    hub = "\n".join(lines).replace("dataset_path: json", "dataset_path: org/nothing")
    (tmp_path / "tiny_text.yaml").write_text(hub)
    (line,) = problems(str(tmp_path), TEXT)
    assert line.startswith(
        "suite.tasks[0]: task 'tiny_text': its data is not on this machine and the hub cannot be "
        "reached ("
    )
    assert line.endswith("Load it once with a connection, or use a task with local files.")


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("unsafe_code: true", "runs code that the model writes, which a search does not do."),
        ("doc_to_image: [picture]", "needs images or sound; only text is scored."),
    ],
)
def test_tasks_that_are_not_for_a_search(addition, message, tmp_path):
    folder = rewrite(tmp_path, "tiny_choice.yaml", ("test_split", f"{addition}\ntest_split"))
    assert problems(folder, CHOICE) == [
        f"suite.tasks[0]: task 'tiny_choice' {message} Leave it out."
    ]


def test_thinking_has_no_place_among_log_likelihoods(folder):
    chat = {"apply_chat_template": True, "enable_thinking": True, "think_end_token": "x"}
    assert problems(folder, CHOICE, ANSWER, chat=chat) == [
        "suite.chat.enable_thinking: task 'tiny_choice' compares log-likelihoods, which leave no "
        "room to think. Leave the task or the switch out."
    ]
    with pytest.raises(ConfigError, match=r"chat\.enable_thinking needs chat.think_end_token"):
        make_suite(folder, ANSWER, chat={"enable_thinking": True})


def test_all_problems_come_at_once(folder):
    found = problems(
        [folder, "/nowhere"],
        {"task": "nothing", "metric": "acc"},
        {**CHOICE, "metric": "f1", "num_fewshot": 99},
        {**ANSWER, "generation": {"until": 1}},
        items={"search": 30, "confirm": {"count": 1, "split": "dev"}},
    )
    fields = [line.partition(": ")[0] for line in found]
    assert fields == [
        "suite.include_path[1]",
        "suite.tasks[0]",
        "suite.tasks[1].num_fewshot",
        "suite.tasks[1].metric",
        "suite.items.confirm.split",
        "suite.items",
        "suite.tasks[2].generation.until",
        "suite.items.confirm.split",
        "suite.items",
    ]


def test_roles_and_chunks_keep_strata(folder):
    items = {"search": 8, "confirm": 8, "report": 8, "stratify": "subject"}
    suite = load_tasks(make_suite(folder, CHOICE, items=items, chunks=2))
    drawn = []
    for role in ("search", "confirm", "report"):
        ids = suite.items(role)["tiny_choice"]
        assert len(ids) == 8
        assert sum(i % 4 == 0 for i in ids) == 2  # a quarter of the documents is cold
        chunks = suite.chunks(role)
        assert [(chunk.role, chunk.index, chunk.num_items) for chunk in chunks] == [
            (role, 0, 4),
            (role, 1, 4),
        ]
        assert [sum(i % 4 == 0 for i in c.items["tiny_choice"]) for c in chunks] == [1, 1]
        drawn += ids
    assert sorted(drawn) == list(range(24))


def test_tasks_draw_apart_and_seeds_matter(folder):
    suite = load_tasks(make_suite(folder, CHOICE, ANSWER))
    assert suite.items("search")["tiny_choice"] != suite.items("search")["tiny_answer"]
    other = load_tasks(make_suite(folder, CHOICE, items={"search": 12, "confirm": 8, "seed": 1}))
    assert other.items("search")["tiny_choice"] != suite.items("search")["tiny_choice"]


def test_a_role_without_items_has_no_chunks(folder):
    assert load_tasks(make_suite(folder, CHOICE)).chunks("report") == ()


def test_aggregation_is_that_of_lm_eval(folder):
    suite = load_tasks(make_suite(folder))
    rng = np.random.default_rng(0)
    correct = [float(x) for x in rng.integers(0, 2, 9)]
    sums = [
        [-float(x), int(n)] for x, n in zip(rng.random(9) * 50, rng.integers(5, 9, 9), strict=True)
    ]
    ids = tuple(range(9))
    result = {
        "tiny_choice": TaskItems(ids, {"acc,none": (*correct[:8], None)}),
        "tiny_text": TaskItems(
            ids, dict.fromkeys(("byte_perplexity,none", "bits_per_byte,none"), tuple(sums))
        ),
    }
    metrics = suite.aggregate(result)
    accuracy = metrics["tiny_choice"]["acc,none"]
    assert accuracy.num_items == 8  # None is an item without a value
    assert accuracy.value == pytest.approx(np.mean(correct[:8]), rel=1e-15)
    assert accuracy.stderr == pytest.approx(np.std(correct[:8], ddof=1) / math.sqrt(8), rel=1e-14)
    rate = -sum(s for s, _ in sums) / sum(n for _, n in sums)
    assert metrics["tiny_text"]["byte_perplexity,none"].value == pytest.approx(
        math.exp(rate), rel=1e-14
    )
    assert metrics["tiny_text"]["bits_per_byte,none"].value == pytest.approx(
        rate / math.log(2), rel=1e-14
    )
    assert metrics["tiny_text"]["byte_perplexity,none"].stderr is None


def test_the_metric_that_counts_must_be_a_number(folder):
    suite = load_tasks(make_suite(folder, TEXT))
    keys = ("byte_perplexity,none", "word_perplexity,none")

    def aggregate(value, key):
        return suite.aggregate(
            {"tiny_text": TaskItems((0,), {**dict.fromkeys(keys, ([-3.0, 2],)), key: (value,)})}
        )

    with pytest.raises(
        NonFiniteError, match="task 'tiny_text': byte_perplexity,none is inf over 1 items"
    ):
        aggregate([-9000.0, 2], keys[0])
    with pytest.raises(EvaluationError, match="byte_perplexity,none is not one number over these"):
        aggregate([-9000.0, 0], keys[0])
    with pytest.raises(
        EvaluationError, match="task 'tiny_text': no item has a value of byte_perplexity,none"
    ):
        aggregate(None, keys[0])
    # another metric is only left out
    assert list(aggregate([-9000.0, 2], keys[1])["tiny_text"]) == [keys[0]]


@pytest.mark.slow
def test_the_collection_of_lm_eval(folder):
    found = problems(
        folder,
        {"task": "arc_easi", "metric": "acc"},
        {"task": "ai2_arc", "metric": "acc"},
        {"task": "arithmetic_1dc", "metric": "acc"},
    )
    assert found[0] == "suite.tasks[0]: no task is called 'arc_easi'. Did you mean arc_easy?"
    assert found[1].endswith("Write out those that are meant: arc_challenge, arc_easy.")
    assert "its data is not on this machine and the hub cannot be reached" in found[2]


def test_a_metric_that_is_no_mean_gets_numbers_per_item(tmp_path):
    """chrF over a corpus: the numbers' mean is near it, and each is what its item is worth."""
    suite = load_tasks(
        make_suite(write_tasks(tmp_path), {**ANSWER, "metric": "chrf,whole"}, CHOICE)
    )
    assert suite.means == ("tiny_choice",)
    pairs = [("low", "low"), ("high", "low"), ("lo", "low"), ("hi", "high")]
    values = tuple((answer, text) for text, answer in pairs)
    items = TaskItems((0, 1, 2, 3), {"chrf,whole": values})
    other = TaskItems((0, 1), {"acc,none": (1.0, 0.0)})
    result = {"tiny_answer": items, "tiny_choice": other}
    numbered = suite.with_numbers(result)
    assert numbered["tiny_choice"] == other, "a mean has its numbers already"
    numbers = numbered["tiny_answer"].values["chrf,whole"]

    def chrf(ids):
        some = TaskItems(ids, {"chrf,whole": tuple(values[i] for i in ids)})
        return suite.aggregate({"tiny_answer": some})["tiny_answer"]["chrf,whole"].value

    whole = chrf((0, 1, 2, 3))
    for i, number in enumerate(numbers):
        rest = tuple(j for j in range(4) if j != i)
        assert number == pytest.approx(4 * whole - 3 * chrf(rest), rel=1e-12)
    assert numbers[0] > numbers[2] > numbers[1], "right, nearly right, wrong"
