"""What a model did with each item, against decoding by hand, stock lm-eval and plain searching."""

import json
import re

import pytest
import torch

from evomerge.evaluate.evaluator import TaskItems, join_results
from evomerge.evaluate.flags import flags_of, rates_of
from evomerge.evaluate.scores import ScoredTask
from tests.evaluate.helpers import (
    ANSWER,
    CHOICE,
    TEXT,
    make_harness,
    make_suite,
    rewrite,
    run_stock,
)
from tests.tiny import make_model, make_tokenizer

ALL = {"search": {"count": None}, "confirm": 0}
MEASURED = "- {metric: acc, aggregation: mean, higher_is_better: true}"
MCC = "- {metric: mcc, aggregation: mcc, higher_is_better: true}"
BRIER = "- {metric: brier_score, aggregation: brier_score, higher_is_better: false}"


@pytest.fixture(scope="module")
def model():
    return make_model(0)


def score_all(harness, model, role="search"):
    return join_results([harness.score(model, chunk) for chunk in harness.chunks(role)])


def decode_by_hand(model, tokenizer, prompt, most, ends):
    """Greedy tokens one at a time, and what ended them: an end token, `stop` or None."""
    tokens, made = tokenizer(prompt).input_ids, []
    while len(made) < most:
        with torch.no_grad():
            following = int(model(torch.tensor([tokens + made])).logits[0, -1].argmax())
        if following in ends:
            return made, following
        made.append(following)
        if tokenizer.decode([following]) in ("\n", "."):
            return made, "stop"
    return made, None


@pytest.mark.parametrize("end", ["</s>", "e"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_lengths_and_cuts_are_those_of_decoding_each_item_alone(end, pad, folder):
    # models with one end of text or two; tokenizers that pad with it or with a token of its own
    model, tokenizer = make_model(4), make_tokenizer()
    tokenizer.pad_token = pad
    number = tokenizer.convert_tokens_to_ids(end)
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, number})
    model.lm_head.weight.data[number] *= 1.6  # long answers have its direction at times
    task = {**ANSWER, "generation": {"max_gen_toks": 12}}
    harness = make_harness(make_suite(folder, task, items=ALL, chunks=2), model, tokenizer)
    answers = score_all(harness, model)["tiny_answer"].answers
    endings = []
    for row, item in enumerate(harness._items["search"]["tiny_answer"].values()):
        made, ending = decode_by_hand(
            model, tokenizer, item.requests[0].args[0], 12, {tokenizer.eos_token_id, number}
        )
        endings.append(ending)
        assert answers["length"][row] == len(made)
        assert answers["truncated"][row] == (ending is None)
        text = tokenizer.decode(made[:-1] if ending == "stop" else made, skip_special_tokens=True)
        assert answers["empty"][row] == (not text.strip())
    assert {None, "stop", number} <= set(endings)


def test_two_tasks_with_the_same_prompts_keep_their_own_lengths(folder, tokenizer, model, tmp_path):
    other = rewrite(tmp_path, "tiny_answer.yaml", ("max_gen_toks: 8", "max_gen_toks: 20"))
    text = (tmp_path / "tiny_answer.yaml").read_text()
    (tmp_path / "tiny_longer.yaml").write_text(text.replace("tiny_answer", "tiny_longer"))
    short = {**ANSWER, "generation": {"max_gen_toks": 8}}
    longer = {"task": "tiny_longer", "metric": "exact_match,first"}
    together = make_harness(make_suite(other, short, longer, items=ALL), model, tokenizer)
    result = score_all(together, model)
    for entry in (short, longer):
        alone = make_harness(make_suite(other, entry, items=ALL), model, tokenizer)
        name = entry["task"]
        assert score_all(alone, model)[name].answers["length"] == result[name].answers["length"]
    assert max(result["tiny_answer"].answers["length"]) == 8
    assert max(result["tiny_longer"].answers["length"]) == 20


def test_loglikelihoods_are_those_of_stock(folder, tokenizer, model):
    # all documents in one chunk by lm-eval's own path: the same batches, hence the same bits
    config = make_suite(folder, CHOICE, TEXT, items=ALL, chunks=1, loglikelihood="lm_eval")
    result = score_all(make_harness(config, model, tokenizer), model)
    samples = run_stock(folder, model, tokenizer, ["tiny_choice", "tiny_text"])["samples"]
    choice, text = result["tiny_choice"].answers, result["tiny_text"].answers
    for row, sample in enumerate(samples["tiny_choice"]):
        pairs = [response for (response,) in sample["resps"]]
        assert choice["loglikelihoods"][row] == [total for total, _ in pairs]
        assert choice["greedy"][row] == [greedy for _, greedy in pairs]
        assert choice["gold"][row] == sample["target"]
    for row, sample in enumerate(samples["tiny_text"]):
        assert text["loglikelihoods"][row] == [sample["resps"][0][0]]
    assert set(text) == {"prompt_truncated", "loglikelihoods"}


CHOICES = {
    "plain": [],
    "mutual information": [(MEASURED, f"{MEASURED}\n  {MEASURED.replace('acc', 'acc_mutual_info')}")],
    "in words": [("doc_to_target: answer", 'doc_to_target: "{{choices[answer]}}"')],
    "many questions": [
        ('"{{text}}\\nquestion: {{question}}\\nanswer:"', '"{{answer}}"'),
        ("doc_to_target: answer", "doc_to_target: question"),
    ],
    "several right": [
        ("doc_to_target: answer", 'doc_to_target: "{{[answer, (answer + 1) % 4]}}"'),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", CHOICES)
def test_accuracy_follows_from_chosen_and_gold(kind, tokenizer, model, tmp_path):
    folder = rewrite(tmp_path, "tiny_choice.yaml", *CHOICES[kind])
    config = make_suite(folder, CHOICE, items=ALL)
    items = score_all(make_harness(config, model, tokenizer), model)["tiny_choice"]
    right = [
        float(chosen in gold if isinstance(gold, list) else chosen == gold)
        for chosen, gold in zip(items.answers["chosen"], items.answers["gold"], strict=True)
    ]
    assert tuple(right) == items.values["acc,none"]
    assert 0 < sum(right) < 24
    number = 8 if kind == "mutual information" else 4
    assert all(len(totals) == number for totals in items.answers["loglikelihoods"])
    assert isinstance(items.answers["gold"][0], list) == (kind == "several right")


def test_extraction_failed_where_nothing_is_found(tokenizer, model, tmp_path):
    narrow = ('- name: first\n    filter:\n      - {function: regex, regex_pattern: "([a-z])"}',
              '- name: first\n    filter:\n      - {function: regex, regex_pattern: "[0-9]([a-k])"}')  # fmt: skip
    folder = rewrite(tmp_path, "tiny_answer.yaml", narrow)
    config = make_suite(folder, ANSWER, items={"search": 2, "confirm": {"count": None}})
    harness = make_harness(config, model, tokenizer)
    answers = score_all(harness, model, "confirm")["tiny_answer"].answers
    texts = answers["text"]
    assert answers["extraction_failed,first"] == tuple(
        re.search("[0-9]([a-k])", text) is None for text in texts
    )
    assert answers["extraction_failed,last"] == tuple(
        re.search("([a-z])", text) is None for text in texts
    )
    assert answers["extraction_failed,whole"] == answers["empty"]
    assert 0 < sum(answers["extraction_failed,first"]) < len(texts)
    # the answers of thousands of candidates on search items are not kept
    assert "text" not in score_all(harness, model)["tiny_answer"].answers


def test_prompts_that_lose_their_beginning_are_marked(folder, tokenizer, model):
    harness = make_harness(make_suite(folder, CHOICE, max_length=90), model, tokenizer)
    answers = score_all(harness, model)["tiny_choice"].answers
    longest = [
        max(len(tokenizer("".join(request.args)).input_ids) for request in item.requests)
        for item in harness._items["search"]["tiny_choice"].values()
    ]
    # the last token is only predicted, so one more than the model takes fits
    assert answers["prompt_truncated"] == tuple(length > 91 for length in longest)
    assert 0 < sum(answers["prompt_truncated"]) < 12


def test_answers_survive_json(folder, tokenizer, model):
    harness = make_harness(make_suite(folder), model, tokenizer)
    for items in score_all(harness, model, "search").values():
        for column in items.answers.values():
            assert json.loads(json.dumps(column)) == list(column)


SPOKEN = TaskItems(
    (1, 4, 6),
    {"exact_match,strict": (1.0, 0.0, 0.0)},
    {
        "truncated": (False, True, False),
        "empty": (False, False, True),
        "extraction_failed,strict": (False, True, True),
        "extraction_failed,loose": (False, False, True),
    },
)
COMPARED = TaskItems((0, 2), {"acc,none": (1.0, 0.0)}, {"chosen": (1, 0), "gold": (1, 1)})


def test_flags_are_those_of_the_filter_that_counts():
    tasks = [ScoredTask("spoken", "exact_match,strict"), ScoredTask("compared", "acc,none")]
    result = {"compared": COMPARED, "spoken": SPOKEN, "ignored": SPOKEN}
    assert flags_of(result, tasks) == {
        "truncated": (False, True, False),
        "empty": (False, False, True),
        "extraction failed": (False, True, True),
    }
    loose = [ScoredTask("ignored", "exact_match,loose"), *tasks]
    assert flags_of(result, loose)["extraction failed"] == (False, False, True, False, True, True)
    assert rates_of(result, tasks) == {
        "spoken": {"truncated": 1 / 3, "empty": 1 / 3, "extraction failed": 2 / 3}
    }
    assert flags_of(result, tasks[1:]) == {}
