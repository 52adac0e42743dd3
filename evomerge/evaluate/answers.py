"""Answers: what a model did with each item, beside the metrics, in columns that are kept.

Every item:
    `prompt_truncated`: its prompt did not fit and lost its beginning.
Items whose continuations are compared or measured:
    `loglikelihoods`: one number for each request, so for each choice; tasks that measure mutual
    information ask for every choice a second time, without its question.
    `greedy`: whether each is what the model would have said.
Items with choices:
    `chosen`: number of the most likely choice, the first of equals.
    `gold`: number of the right one, a list where several are right; None where the task names none.
Items that are answered in words:
    `length`: tokens of the answer, stop text included, end-of-text not.
    `truncated`: it was still going on when its tokens were used up.
    `empty`: nothing is left of it before the stop text.
    `extraction_failed,<filter>`: the filter found no answer in it.
    `text`: the answer. Not of search items: of thousands of candidates it would fill a disk.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.filter import FilterEnsemble
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from evomerge.evaluate.evaluator import Value
from evomerge.evaluate.flags import EMPTY, EXTRACTION_FAILED, TRUNCATED
from evomerge.evaluate.prepared_lm import Generated
from evomerge.evaluate.prompts import Item

Columns = dict[str, tuple[Value, ...]]
"""By name, a value for each item."""


def apply_filter(ensemble: FilterEnsemble, requests: Sequence[Instance]) -> list[bool]:
    """Put a filter's responses on requests, as lm-eval does; return which hold no answer.

    A step that found nothing says so by its fallback (lm-eval's `[invalid]`), which a later step
    may turn into something else.

    Args:
        ensemble: One of the task's filters.
        requests: Answered requests of the task.
    """
    responses: list[Any] = [request.resps for request in requests]
    documents = [request.doc for request in requests]
    failed = [False] * len(requests)
    for make_step in ensemble.filters:
        step = make_step()
        responses = list(step.apply(responses, documents))
        fallback = getattr(step, "fallback", None)
        if fallback is not None:
            failed = [
                was or _all_are(fallback, response)
                for was, response in zip(failed, responses, strict=True)
            ]
    for request, response in zip(requests, responses, strict=True):
        request.filtered_resps[ensemble.name] = response
    return [was or _is_empty(found) for was, found in zip(failed, responses, strict=True)]


def scored_answers(task: ConfigurableTask, items: Sequence[Item]) -> Columns:
    """Return the columns of items whose continuations are compared or measured."""
    answers = [[request.resps[0] for request in item.requests] for item in items]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"loglikelihoods": tuple([float(total) for total in answer] for answer in answers)}
    columns: Columns = {
        "loglikelihoods": tuple([float(total) for total, _ in answer] for answer in answers),
        "greedy": tuple([bool(greedy) for _, greedy in answer] for answer in answers),
    }
    if task.OUTPUT_TYPE == "multiple_choice":
        chosen, gold = zip(*map(_choice, [task] * len(items), items), strict=True)
        columns |= {"chosen": chosen, "gold": gold}
    return columns


def worded_answers(
    items: Sequence[Item],
    generated: Callable[[Instance], Generated],
    failed: Mapping[str, Sequence[bool]],
    keep_texts: bool,
) -> Columns:
    """Return the columns of items that are answered in words.

    Args:
        items: Each with one request, as lm-eval makes them; of repeats the first counts.
        generated: Tells how a request's answer came about.
        failed: For each filter, the items in which it found no answer.
        keep_texts: Whether to keep the answers.
    """
    requests = [item.requests[0] for item in items]
    made = [generated(request) for request in requests]
    texts = [str(request.resps[0]) for request in requests]
    columns: Columns = {
        "length": tuple(answer.length for answer in made),
        TRUNCATED: tuple(answer.truncated for answer in made),
        EMPTY: tuple(not text.strip() for text in texts),
    }
    columns |= {f"{EXTRACTION_FAILED},{name}": tuple(where) for name, where in failed.items()}
    return columns | {"text": tuple(texts)} if keep_texts else columns


def _choice(task: ConfigurableTask, item: Item) -> tuple[int, Value]:
    """Return the chosen and the right choice, as lm-eval's `process_results` finds them."""
    choices = task.doc_to_choice(item.document)
    totals = [request.resps[0][0] for request in item.requests[: len(choices)]]
    ask = task.doc_to_text if task.multiple_input else task.doc_to_target
    return totals.index(max(totals)), _gold(ask(item.document), choices)


def _gold(target: Any, choices: Sequence[str]) -> Value:
    if isinstance(target, list):
        return [_gold(member, choices) for member in target]
    if isinstance(target, str):
        return choices.index(target) if target in choices else None
    return int(target) if isinstance(target, int) and 0 <= target < len(choices) else None


def _all_are(fallback: Any, response: Any) -> bool:
    answers = response if isinstance(response, list) else [response]
    return bool(answers) and all(answer == fallback for answer in answers)


def _is_empty(response: Any) -> bool:
    if isinstance(response, (list, tuple)):
        return all(_is_empty(member) for member in response)
    return response is None or (isinstance(response, str) and not response.strip())
