"""The harness against stock lm-eval on the same weights, and against itself."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from evomerge.errors import ConfigError, EvaluationError, NonFiniteError
from evomerge.evaluate.evaluator import join_results
from evomerge.evaluate.prepared_lm import StopRows
from evomerge.evaluate.tasks import load_tasks
from tests.evaluate.helpers import (
    ANSWER,
    CHOICE,
    TEXT,
    make_harness,
    make_suite,
    rewrite,
    run_stock,
)
from tests.tiny import (
    VOCABULARY,
    make_model,
    make_tokenizer,
    write_documents,
    write_tasks,
)

NAMES = ("tiny_choice", "tiny_answer", "tiny_text")
STYLES = {
    "zero-shot": ({}, {}),
    "two-shot": ({"num_fewshot": 2}, {}),
    "chat": (
        {"num_fewshot": 2},
        {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "system_instruction": "be kind",
        },
    ),
    "chat in one turn": ({"num_fewshot": 2}, {"apply_chat_template": True}),
}


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def two_shot(folder, tokenizer, model):
    """Stock lm-eval on the first model, with two examples before each question."""
    return run_stock(folder, model, tokenizer, NAMES, num_fewshot=2)


@pytest.fixture
def weights(model):
    """The model, whose weights are put back afterwards."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model
    model.load_state_dict(kept)


def score_all(harness, model, role="search"):
    return join_results([harness.score(model, chunk) for chunk in harness.chunks(role)])


def stock_values(stock, task):
    """Stock results per item: metric key → document number → value, tuples as lists."""
    values = {}
    for sample in stock["samples"][task]:
        for metric in sample["metrics"]:
            # through JSON: tuples and arrays become lists
            plain = json.loads(json.dumps(sample[metric], default=lambda value: value.tolist()))
            values.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = plain
    return values


def as_mapping(items):
    return {key: dict(zip(items.ids, column, strict=True)) for key, column in items.values.items()}


@pytest.mark.parametrize("style", STYLES)
def test_equals_simple_evaluate(style, folder, tokenizer, model):
    # all documents in one chunk: the same batches as stock, hence the same bits
    shots, chat = STYLES[style]
    tasks = [{**task, **shots} for task in (CHOICE, ANSWER, TEXT)]
    items = {"search": {"count": None}, "confirm": 0}
    config = make_suite(folder, *tasks, chat=chat, items=items, chunks=1)
    harness = make_harness(config, model, tokenizer)
    stock_chat = {"fewshot_as_multiturn": False, **chat}
    stock = run_stock(folder, model, tokenizer, NAMES, **shots, **stock_chat)
    result = score_all(harness, model)
    for task in NAMES:
        assert as_mapping(result[task]) == stock_values(stock, task)
        for sample in stock["samples"][task]:
            requests = harness._items["search"][task][sample["doc_id"]].requests
            assert [request.args for request in requests] == sample["arguments"]
    metrics = load_tasks(config).aggregate(result)
    for task in NAMES:
        expected = {
            key: value
            for key, value in stock["results"][task].items()
            if "," in key and "stderr" not in key
        }
        assert {key: metric.value for key, metric in metrics[task].items()} == expected
        assert all(metric.num_items == 24 for metric in metrics[task].values())


def test_equals_simple_evaluate_in_bfloat16(folder, tokenizer):
    # log-likelihoods are summed in float32, else choices tie
    model = make_model(0, dtype=torch.bfloat16)
    items = {"search": {"count": None}, "confirm": 0}
    config = make_suite(folder, CHOICE, TEXT, items=items, chunks=1)
    result = score_all(make_harness(config, model, tokenizer), model)
    stock = run_stock(folder, model, tokenizer, ["tiny_choice", "tiny_text"])
    for task, values in result.items():
        assert as_mapping(values) == stock_values(stock, task)


def test_the_answers_of_the_reference_differ_between_items(two_shot):
    # guards the test above against a model that answers everything alike
    texts = {value[1] for value in stock_values(two_shot, "tiny_answer")["chrf,whole"].values()}
    assert len(texts) > 12
    for key in ("acc,none", "acc_norm,none"):
        assert 0 < two_shot["results"]["tiny_choice"][key] < 1


OTHER_KINDS = {
    # choices scored without a context too
    "mutual information": ("choice", ("metric: acc,", "metric: acc_mutual_info,")),
    "probabilities": (
        "choice",
        ("acc, aggregation: mean", "brier_score, aggregation: brier_score"),
    ),
    "prefix": ("choice", ('doc_to_text: "', 'gen_prefix: "so"\ndoc_to_text: "')),
    # the choices are put into the question and the same answer follows each
    "many questions": (
        "choice",
        ('"{{text}}\\nquestion: {{question}}\\nanswer:"', '"{{answer}}"'),
        ("doc_to_target: answer", "doc_to_target: question"),
    ),
    "repeats": ("answer", ("output_type", "repeats: 2\noutput_type")),
    "one answer": (
        "text",
        ("output_type: loglikelihood_rolling", "output_type: loglikelihood"),
        ('doc_to_text: ""', 'doc_to_text: "say"'),
        (
            "byte_perplexity, aggregation: weighted_perplexity",
            "perplexity, aggregation: perplexity",
        ),
    ),
}


REL = 1e-4
"""Of probabilities: packed log-likelihoods of this model, about -80, have errors of 1e-5 or 2e-5."""


def flat(value):
    """The numbers in nested lists and mappings."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    return [n for member in value for n in flat(member)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("path", ["lm_eval", "auto"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_equals_simple_evaluate_on_other_kinds(kind, path, tokenizer, model, tmp_path):
    file, *changes = OTHER_KINDS[kind]
    folder, name = rewrite(tmp_path, f"tiny_{file}.yaml", *changes), f"tiny_{file}"
    counted = {"choice": "acc_norm", "answer": "exact_match,last", "text": "perplexity"}[file]
    items = {"search": {"count": None}, "confirm": 0}
    task = {"task": name, "metric": counted}
    config = make_suite(folder, task, items=items, chunks=1, loglikelihood=path)
    result = score_all(make_harness(config, model, tokenizer), model)
    stock = run_stock(folder, model, tokenizer, [name])
    found, expected = as_mapping(result[name]), stock_values(stock, name)
    totals = {key: m.value for key, m in load_tasks(config).aggregate(result)[name].items()}
    stock_totals = {key: stock["results"][name][key] for key in totals}
    if path == "lm_eval" or file == "answer":
        assert found == expected
        assert totals == stock_totals
    else:
        assert flat(found) == pytest.approx(flat(expected), rel=REL)
        assert totals == pytest.approx(stock_totals, rel=REL)


CUSTOM = """
import math

def score(document, results):
    text = results[0]
    found = {"length": len(text), "vowels": sum(map(text.count, "aeiou"))}
    if len(text) > 4:
        found["long"] = (text, len(text))
    found["share"] = found["vowels"] / len(text) if len(text) > 2 else math.nan
    return found

def longest(items):
    return max(length for _, length in items)
"""

CUSTOM_YAML = """
process_results: !function custom.score
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: true}
  - {metric: vowels, aggregation: mean, higher_is_better: true}
  - {metric: share, aggregation: nanmean, higher_is_better: true}
  - {metric: long, aggregation: !function custom.longest, higher_is_better: true}
  - {metric: never, aggregation: mean, higher_is_better: true}
"""


def test_metrics_of_ones_own(tokenizer, model, tmp_path):
    folder = write_tasks(tmp_path)
    (tmp_path / "custom.py").write_text(CUSTOM)
    text = (tmp_path / "tiny_answer.yaml").read_text()
    head, _, _ = text.partition("filter_list")
    (tmp_path / "tiny_answer.yaml").write_text(head + CUSTOM_YAML)
    items = {"search": {"count": None}, "confirm": 0}
    config = make_suite(folder, {"task": "tiny_answer", "metric": "length"}, items=items)
    result = score_all(make_harness(config, model, tokenizer), model)
    stock = run_stock(folder, model, tokenizer, ["tiny_answer"])["results"]["tiny_answer"]
    column = result["tiny_answer"].values
    assert 0 < column["long,none"].count(None) < 24  # a metric that some items do not have
    assert column["share,none"].count(None) > 0  # a metric that is NaN for some
    metrics = load_tasks(config).aggregate(result)["tiny_answer"]
    for key in ("length,none", "vowels,none", "share,none", "long,none"):
        assert metrics[key].value == pytest.approx(stock[key], rel=1e-15)
    for metric, error in (("never", EvaluationError), ("share", NonFiniteError)):
        other = make_suite(folder, {"task": "tiny_answer", "metric": metric}, items=items)
        with pytest.raises(error, match=f"task 'tiny_answer'.* {metric},none"):
            score_all(make_harness(other, model, tokenizer), model)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_subset_scores_as_within_the_whole(chunks, folder, tokenizer, model, two_shot):
    tasks = [{**task, "num_fewshot": 2} for task in (CHOICE, ANSWER, TEXT)]
    config = make_suite(folder, *tasks, chunks=chunks)
    result = score_all(make_harness(config, model, tokenizer), model)
    for task in NAMES:
        assert len(result[task].ids) == 12
        for key, column in as_mapping(result[task]).items():
            expected = stock_values(two_shot, task)[key]
            for i, value in column.items():
                if task == "tiny_text":
                    # other batches, other order of float32 sums: about 60 terms of size 10 with
                    # 1e-7 each
                    assert value[0] == pytest.approx(expected[i][0], rel=1e-5)
                    assert value[1] == expected[i][1]
                else:
                    assert value == expected[i]


def test_each_role_scores_as_within_the_whole(folder, tokenizer, model, two_shot):
    # confirm is prepared after search on the same task: its few-shot draws start from the seed
    # again
    config = make_suite(folder, {**CHOICE, "num_fewshot": 2}, {**ANSWER, "num_fewshot": 2})
    harness = make_harness(config, model, tokenizer)
    for role in ("search", "confirm"):
        for task, items in score_all(harness, model, role).items():
            for key, column in as_mapping(items).items():
                assert column == {i: stock_values(two_shot, task)[key][i] for i in items.ids}


def test_another_split_scores_as_a_task_on_that_split(folder, tokenizer, model, tmp_path):
    # questions of the split that examples are shown from: never shown their own answer
    config = make_suite(
        folder,
        {**CHOICE, "num_fewshot": 2},
        items={"search": {"count": None, "split": "train"}, "confirm": 0},
        chunks=1,
    )
    result = score_all(make_harness(config, model, tokenizer), model)
    text = (Path(folder) / "tiny_choice.yaml").read_text()
    other = text.replace("test_split: test", "test_split: train")
    (tmp_path / "other.yaml").write_text(other)
    stock = run_stock(str(tmp_path), model, tokenizer, ["tiny_choice"], num_fewshot=2)
    assert as_mapping(result["tiny_choice"]) == stock_values(stock, "tiny_choice")


def test_no_question_is_shown_with_its_answer(folder, tokenizer, model, tmp_path):
    text = (Path(folder) / "tiny_choice.yaml").read_text().replace("fewshot_split: train\n", "")
    (tmp_path / "other.yaml").write_text(text)
    config = make_suite(
        str(tmp_path),
        {**CHOICE, "num_fewshot": 6},
        items={"search": {"count": None, "split": "train"}, "confirm": 0},
    )
    harness = make_harness(config, model, tokenizer)
    for item in harness._items["search"]["tiny_choice"].values():
        prompt = item.requests[0].args[0]
        assert prompt.count(item.document["text"]) == 1


def test_chunks_join_to_the_whole(folder, tokenizer, model):
    parts = make_harness(make_suite(folder, chunks=5), model, tokenizer)
    whole = make_harness(make_suite(folder, chunks=1), model, tokenizer)
    chunks = [parts.score(model, chunk) for chunk in parts.chunks("search")]
    joined, at_once = join_results(chunks[::-1]), score_all(whole, model)
    assert len(chunks) == 5
    assert joined["tiny_answer"] == at_once["tiny_answer"]
    one, other = joined["tiny_choice"], at_once["tiny_choice"]
    assert (one.ids, one.values) == (other.ids, other.values)
    assert {**one.answers, "loglikelihoods": ()} == {**other.answers, "loglikelihoods": ()}
    pairs = zip(one.answers["loglikelihoods"], other.answers["loglikelihoods"], strict=True)
    for numbers, others in pairs:
        assert numbers == pytest.approx(others, rel=1e-5)  # as below
    for key, column in joined["tiny_text"].values.items():
        for value, other in zip(column, at_once["tiny_text"].values[key], strict=True):
            assert value == pytest.approx(other, rel=1e-5)  # as above


def test_same_weights_same_bits(folder, tokenizer, model):
    harness = make_harness(make_suite(folder), model, tokenizer)
    first = score_all(harness, model)
    score_all(harness, model, "confirm")
    assert score_all(harness, model) == first
    assert score_all(make_harness(make_suite(folder), model, tokenizer), model) == first


def test_new_weights_in_place_are_what_is_scored(folder, tokenizer, weights):
    config, other = make_suite(folder), make_model(1)
    harness = make_harness(config, weights, tokenizer)
    before = score_all(harness, weights)
    kept = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
    weights.load_state_dict(other.state_dict())
    expected = score_all(make_harness(config, other, tokenizer), other)
    after = score_all(harness, weights)
    assert after == expected
    assert after["tiny_text"] != before["tiny_text"]
    assert after["tiny_answer"] != before["tiny_answer"]
    weights.load_state_dict(kept)
    assert score_all(harness, weights) == before


def test_scoring_leaves_weights_and_generators_alone(folder, tokenizer, model):
    harness = make_harness(make_suite(folder), model, tokenizer)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    score_all(harness, model)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_hooks


@pytest.mark.parametrize("task", [CHOICE, ANSWER, TEXT], ids=NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_score(value, task, folder, tokenizer, weights):
    harness = make_harness(make_suite(folder, task), weights, tokenizer)
    weights.model.norm.weight.data[3] = value
    with pytest.raises(NonFiniteError, match=rf"task '{task['task']}' item \d+: .* NaN or Inf"):
        score_all(harness, weights)
    assert not weights._forward_hooks


@pytest.mark.parametrize("task", [CHOICE, ANSWER], ids=NAMES[:2])
def test_the_item_that_is_not_finite_is_named(task, tokenizer, weights, tmp_path):
    folder = write_tasks(tmp_path)
    words = ["cat", "dog", "50% off", "bird", "fish", "cow"]
    common = {"text": "a b", "choices": ["x", "yz"], "answer": 1}
    documents = [{**common, "question": word} for word in words]
    write_documents(tmp_path / "choice_test.jsonl", documents)
    write_documents(
        tmp_path / "answer_test.jsonl", [{"question": w, "answer": "low"} for w in words]
    )
    config = make_suite(folder, task, items={"search": 6, "confirm": 0}, chunks=1)
    harness = make_harness(config, weights, tokenizer)
    score_all(harness, weights)
    weights.model.embed_tokens.weight.data[VOCABULARY.index("%")] = math.nan
    with pytest.raises(NonFiniteError, match="item 2:"):
        score_all(harness, weights)


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts what it is asked to encode."""

    asked = 0

    def encode(self, *args, **kwargs):
        type(self).asked += 1
        return super().encode(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        type(self).asked += 1
        return super().__call__(*args, **kwargs)


def test_texts_are_tokenised_once(folder, weights):
    tokenizer = make_tokenizer()
    tokenizer.__class__ = CountingTokenizer
    harness = make_harness(make_suite(folder), weights, tokenizer)
    assert CountingTokenizer.asked > 0
    score_all(harness, weights)
    asked = CountingTokenizer.asked
    weights.load_state_dict(make_model(1).state_dict())
    score_all(harness, weights)
    assert CountingTokenizer.asked == asked


def test_rows_stop_at_their_own_stop_text(folder, tokenizer, model):
    # stock goes on until every row has met the same stop text; the texts are the same, the steps
    # are fewer
    config = make_suite(folder, {**ANSWER, "generation": {"until": ["a", "e"], "max_gen_toks": 40}})
    harness = make_harness(config, model, tokenizer)
    requests = [
        r for item in harness._items["search"]["tiny_answer"].values() for r in item.requests
    ]
    stock = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=4)
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    expected = stock.generate_until(requests, disable_tqdm=True)
    stock_steps = len(steps)
    answers = harness._lm.generate_until(requests, disable_tqdm=True)
    hook.remove()
    assert answers == expected
    assert len(steps) - stock_steps < stock_steps


def digest_of(config, model, tokenizer):
    return make_harness(config, model, tokenizer).facts().digest


@pytest.fixture(scope="module")
def own(folder, tokenizer, model):
    """Digest of the suite as it is."""
    return digest_of(make_suite(folder), model, tokenizer)


def test_digest_is_of_what_is_asked(own, folder, tokenizer, model, tmp_path):
    copy = write_tasks(tmp_path)
    assert digest_of(make_suite(copy), model, tokenizer) == own  # where the files lie is no matter
    weighted = [{**CHOICE, "weight": 3.0, "floor": 0.25}, ANSWER, TEXT]
    assert digest_of(make_suite(folder, *weighted), model, tokenizer) == own
    assert digest_of(make_suite(folder), make_model(5), tokenizer) == own
    harness = make_harness(make_suite(folder), model, tokenizer)
    score_all(harness, model, "confirm")
    assert harness.facts().digest == own


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("tiny_choice.yaml", "question:", "q:"),
        ("tiny_answer.yaml", "max_gen_toks: 8", "max_gen_toks: 9"),
        ("tiny_answer.yaml", "group_select: -1", "group_select: -2"),
        ("tiny_text.yaml", "version: 3.0", "version: 3.1"),
        ("choice_test.jsonl", '"answer": 3', '"answer": 2'),
        ("text_test.jsonl", "a", "b"),
    ],
)
def test_digest_changes_with_task_and_data(file, old, new, own, tokenizer, model, tmp_path):
    copy = rewrite(tmp_path, file, (old, new))
    assert digest_of(make_suite(copy), model, tokenizer) != own


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 5},
        {"loglikelihood": "lm_eval"},
        {"chunks": 2},
        {"max_length": 500},
        {"items": {"search": 11, "confirm": 8}},
        {"items": {"search": 12, "confirm": 8, "seed": 1}},
        {"chat": {"apply_chat_template": True}},
        {"add_bos_token": False},
    ],
    ids=str,
)
def test_digest_changes_with_settings(settings, own, folder, tokenizer, model):
    assert digest_of(make_suite(folder, **settings), model, tokenizer) != own


def test_items_a_study_may_change_have_a_digest_of_their_own(folder, tokenizer, model):
    """More confirm items later leave what the search was scored on, and its digest, as it was."""
    both = [
        make_harness(
            make_suite(folder, items={"search": 6, "confirm": n}), model, tokenizer
        ).facts()
        for n in (8, 9)
    ]
    assert both[0].digest == both[1].digest
    assert both[0].unseen != both[1].unseen


@pytest.mark.slow
def test_digest_and_results_are_the_same_in_another_process(folder, tokenizer, model):
    code = (
        "import sys; from tests.evaluate.test_harness import *; config = make_suite(sys.argv[1]); "
        "model = make_model(0); harness = make_harness(config, model, make_tokenizer()); "
        "print(harness.facts().digest, harness.chunks('search'), score_all(harness, model))"
    )
    harness = make_harness(make_suite(folder), model, tokenizer)
    own = f"{harness.facts().digest} {harness.chunks('search')} {score_all(harness, model)}"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "77",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    run = subprocess.run(
        [sys.executable, "-c", code, folder],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert run.stdout.strip() == own


def test_facts_count_the_items(folder, tokenizer, model):
    config = make_suite(folder, CHOICE, ANSWER, items={"search": 5, "confirm": 3, "report": 2})
    harness = make_harness(config, model, tokenizer)
    assert harness.facts().num_items == {
        "search": {"tiny_choice": 5, "tiny_answer": 5},
        "confirm": {"tiny_choice": 3, "tiny_answer": 3},
        "report": {"tiny_choice": 2, "tiny_answer": 2},
    }


def refused(config, model, tokenizer, error):
    with pytest.raises(error) as caught:
        make_harness(config, model, tokenizer)
    return str(caught.value)


def test_what_cannot_be_scored_is_refused(folder, tokenizer, model, tmp_path):
    chat = {"apply_chat_template": True}
    bare = make_tokenizer()
    bare.chat_template = None
    message = refused(make_suite(folder, chat=chat), model, bare, ConfigError)
    assert message.startswith("suite.chat.apply_chat_template: the tokenizer has no chat template.")
    chat = {"apply_chat_template": "polite"}
    message = refused(make_suite(folder, chat=chat), model, tokenizer, ConfigError)
    assert "no chat template 'polite'. It has one without a name; write true." in message
    long = {**ANSWER, "generation": {"max_gen_toks": 1024}}
    message = refused(make_suite(folder, long), model, tokenizer, EvaluationError)
    assert "max_gen_toks 1024 leaves no room for a prompt, the model takes 1024 tokens" in message
    message = refused(make_suite(folder, CHOICE, max_length=4), model, tokenizer, EvaluationError)
    assert "tokens, 1 to 4 can be scored" in message
    small = make_model(0, vocab_size=40)
    message = refused(make_suite(folder, CHOICE), small, tokenizer, EvaluationError)
    assert "the model has 40. Take the tokenizer of this model." in message


def test_named_chat_template(folder, model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {
        "default": "{{ messages[0]['content'] }}",
        "loud": "{{ messages[0]['content'] }}!",
    }
    config = make_suite(folder, ANSWER, chat={"apply_chat_template": "loud"})
    harness = make_harness(config, model, tokenizer)
    prompts = [
        item.requests[0].args[0] for item in harness._items["search"]["tiny_answer"].values()
    ]
    assert all(prompt.startswith("question:") and prompt.endswith("!") for prompt in prompts)


def test_long_prompts_are_announced(folder, tokenizer, model, caplog):
    make_harness(make_suite(folder, CHOICE, max_length=60), model, tokenizer)
    assert "items do not fit into 60 tokens and lose their beginning" in caplog.text


def test_the_thinking_is_cut(folder, tokenizer, model):
    free = make_harness(make_suite(folder, ANSWER), model, tokenizer)
    texts = [text for _, text in score_all(free, model)["tiny_answer"].values["chrf,whole"]]
    mark = next(text[1] for text in texts if len(text) > 2 and text[1].isalpha())
    chat = {"apply_chat_template": True, "enable_thinking": True, "think_end_token": mark}
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    thinking = make_harness(make_suite(folder, ANSWER, chat=chat), model, tokenizer)
    values = score_all(thinking, model)["tiny_answer"].values["chrf,whole"]
    assert all(mark not in text for _, text in values)
    assert [text for _, text in values] != texts


def test_a_stop_text_within_the_thinking_does_not_count(tokenizer):
    texts = ["q:ab.cde", "q:abc.de", "q:abcde.", "q:abcd.e"]
    rows = tokenizer(texts, return_tensors="pt", add_special_tokens=False).input_ids
    stop = StopRows(tokenizer, (".",), prompt_length=2, window=3, think_end="c")
    assert stop(rows, None).tolist() == [False, True, True, True]
    stop = StopRows(tokenizer, (".",), prompt_length=2, window=3)
    assert stop(rows, None).tolist() == [False, True, True, True]
    stop = StopRows(tokenizer, (".",), prompt_length=2, window=5)
    assert stop(rows, None).tolist() == [True, True, True, True]
