"""Harness: scores the live model on a suite with lm-eval's requests, filters and metrics."""

import dataclasses
import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from typing_extensions import override

from evomerge.config.suite import ROLES, ItemRole, SuiteConfig
from evomerge.errors import ConfigError, EvaluationError, NonFiniteError
from evomerge.evaluate.answers import Columns, apply_filter, scored_answers, worded_answers
from evomerge.evaluate.catalog import quiet
from evomerge.evaluate.evaluator import (
    AbstractEvaluator,
    Chunk,
    EvalResult,
    SuiteFacts,
    TaskItems,
    Value,
)
from evomerge.evaluate.flags import PROMPT_TRUNCATED
from evomerge.evaluate.plain import digest, is_finite, plain
from evomerge.evaluate.prepared_lm import NonFinitePrompt, PreparedLM
from evomerge.evaluate.prompts import Item, build_items, remember_targets
from evomerge.evaluate.tasks import SuiteTask, TaskSuite
from evomerge.evaluate.time_limit import Clock, limited

log = logging.getLogger(__name__)


class Harness(AbstractEvaluator):
    """lm-eval around one live model.

    Prompts, tokens and targets of the search items are prepared when it is made, those of other
    roles at their first use; a candidate then costs forward passes and metrics. Batches are the
    same for every candidate. lm-eval's filters see the items of one chunk at a time.

    Args:
        tasks: The suite's tasks, from `load_tasks`.
        config: The suite.
        model: The live model, on its device. Its weights may be overwritten between calls; it stays
            this object.
        tokenizer: The tokenizer of what is scored.
        clock: Tells the time, for the suite's time limit.

    Raises:
        ConfigError: The tokenizer has no such chat template.
        EvaluationError: Items that cannot be scored: no tokens to predict, answers longer than the
            model takes.
    """

    def __init__(
        self,
        tasks: TaskSuite,
        config: SuiteConfig,
        model: torch.nn.Module,
        tokenizer: Any,
        clock: Clock = time.monotonic,
    ) -> None:
        _check_chat(config, tokenizer)
        self._tasks, self._config, self._clock = tasks, config, clock
        with quiet():
            self._lm = PreparedLM(model, tokenizer, config)
        self._items: dict[ItemRole, dict[str, dict[int, Item]]] = {}
        self._shortened: dict[tuple[ItemRole, str], frozenset[int]] = {}
        searched = self._prepare("search").values()
        with quiet():
            self._lm.choose_path(
                [r for items in searched for item in items.values() for r in item.requests]
            )
        self._facts = SuiteFacts(
            digest=self._digest(),
            unseen=digest(
                [
                    [task.name, role, part.split, part.ids, part.contents]
                    for task in tasks.tasks
                    for role, part in task.roles.items()
                    if role != "search"
                ]
            ),
            num_items={
                role: {name: len(ids) for name, ids in tasks.items(role).items()} for role in ROLES
            },
        )

    @override
    def facts(self) -> SuiteFacts:
        return self._facts

    @override
    def chunks(self, role: ItemRole) -> tuple[Chunk, ...]:
        return self._tasks.chunks(role)

    @override
    def score(self, model: torch.nn.Module, chunk: Chunk) -> EvalResult:
        assert model is self._lm.model, "the harness is bound to the model it was made with"
        prepared = self._prepare(chunk.role)
        picked = {
            task.name: {i: _fresh(prepared[task.name][i]) for i in chunk.items[task.name]}
            for task in self._tasks.tasks
            if task.name in chunk.items
        }
        where, limit_s = f"{chunk.role} chunk {chunk.index}", self._config.time_limit
        with quiet():
            with limited(model, limit_s, self._clock, where):
                self._answer([item for items in picked.values() for item in items.values()])
            return {
                task.name: self._results(task, chunk.role, picked[task.name])
                for task in self._tasks.tasks
                if task.name in picked
            }

    def _prepare(self, role: ItemRole) -> Mapping[str, Mapping[int, Item]]:
        if role not in self._items:
            with quiet():
                self._items[role] = {
                    task.name: self._build(task, role)
                    for task in self._tasks.tasks
                    if role in task.roles
                }
        return self._items[role]

    def _build(self, task: SuiteTask, role: ItemRole) -> dict[int, Item]:
        part, config = task.roles[role], self._config
        remember_targets(part.task)
        items = build_items(
            part.task, part.ids, config.fewshot_seed, config.chat, self._lm.apply_chat_template
        )
        shortened = [
            i for i, item in items.items() if self._check(f"task {task.name!r} item {i}", item)
        ]
        self._shortened[role, task.name] = frozenset(shortened)
        if shortened:
            log.warning(
                "task %r: %d of %d %s items do not fit into %d tokens and lose their beginning",
                task.name, len(shortened), len(items), role, self._lm.max_length,
            )  # fmt: skip
        return items

    def _check(self, where: str, item: Item) -> bool:
        """Return whether lm-eval will cut the beginning of a prompt; refuse what has no score."""
        longest, cut = self._lm.max_length, False
        rows = self._lm.model.get_input_embeddings().weight.shape[0]
        for request in item.requests:
            context, continuation = self._lm.request_tokens(request)
            if (token := max(context + continuation, default=0)) >= rows:
                raise EvaluationError(
                    f"{where}: the tokenizer gives token {token}, the model has {rows}. Take the "
                    "tokenizer of this model."
                )
            if request.request_type == "loglikelihood":
                if not continuation or len(continuation) > longest:
                    raise EvaluationError(
                        f"{where}: an answer has {len(continuation)} tokens, 1 to {longest} can be "
                        "scored. Mend the document or set suite.max_length."
                    )
                cut |= len(context) + len(continuation) > longest + 1
            elif request.request_type == "generate_until":
                arguments = normalize_gen_kwargs(request.args[1], self._lm.max_gen_toks)
                room = longest - arguments["max_gen_toks"]
                if room < 1:
                    raise EvaluationError(
                        f"{where}: max_gen_toks {arguments['max_gen_toks']} leaves no room for a "
                        f"prompt, the model takes {longest} tokens. Lower generation.max_gen_toks."
                    )
                cut |= len(context) > room
        return cut

    def _answer(self, items: Iterable[Item]) -> None:
        """Put the model's responses on the requests; all of a kind in one go, as lm-eval does."""
        by_kind: dict[str, list[Instance]] = defaultdict(list)
        for item in items:
            for request in item.requests:
                by_kind[request.request_type] += [request] * request.repeats
        for kind, requests in by_kind.items():
            try:
                responses = getattr(self._lm, kind)(requests, disable_tqdm=True)
            except NonFinitePrompt as found:
                culprit = next(r for r in requests if r.args[0] == found.prompt)
                raise _non_finite(culprit, "its logits") from None
            except torch.OutOfMemoryError:
                tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
                raise EvaluationError(
                    f"{kind} of {tasks}: a batch does not fit into the device's memory beside the "
                    f"model (suite.batch_size {self._config.batch_size}). Lower it."
                ) from None
            for request, response in zip(requests, responses, strict=True):
                if kind != "generate_until" and not math.isfinite(_loglikelihood(response)):
                    raise _non_finite(request, "a log-likelihood")
                request.resps.append(response)

    def _results(self, task: SuiteTask, role: ItemRole, items: Mapping[int, Item]) -> TaskItems:
        """Filter the responses of a task's items and measure each, as lm-eval's evaluator does."""
        reading = task.roles[role].task
        requests = [request for item in items.values() for request in item.requests]
        failed = {ensemble.name: apply_filter(ensemble, requests) for ensemble in reading._filters}
        values = _measure(task, reading, items)
        shortened = self._shortened[role, task.name]
        answers: Columns = {PROMPT_TRUNCATED: tuple(i in shortened for i in items)}
        asked = list(items.values())
        if reading.OUTPUT_TYPE == "generate_until":
            answers |= worded_answers(asked, self._lm.generated, failed, role != "search")
        else:
            answers |= scored_answers(reading, asked)
        return TaskItems(tuple(items), values, answers)

    def _digest(self) -> str:
        # what is confirmed on changes no score of the search, nor does the time it may take
        unseen = {"confirm": True, "report": True}
        settings = self._config.model_dump(
            exclude={"include_path": True, "tasks": True, "items": unseen, "time_limit": True}
        )
        generation = getattr(self._lm.model, "generation_config", None)
        defaults = generation.to_diff_dict() if generation is not None else {}
        return digest(
            {
                "settings": settings,
                "max_length": self._lm.max_length,
                "loglikelihood": self._lm.loglikelihood_path,
                "generation_config": {
                    k: v for k, v in defaults.items() if k != "transformers_version"
                },
                "tasks": [self._describe(task) for task in self._tasks.tasks],
            }
        )

    def _describe(self, task: SuiteTask) -> dict[str, Any]:
        """Return what decides a task's numbers: what is asked, of which items, how it is judged."""
        config, searched = task.task.config, self._items["search"].get(task.name, {})
        searching = task.roles["search"]
        judged = ("output_type", "filter_list", "metric_list", "process_results", "repeats")
        return {
            "task": task.name,
            "metric": task.metric,
            "version": task.task.VERSION,
            "judged": {field: getattr(config, field) for field in judged},
            "items": [searching.split, searching.ids, searching.contents],
            "asked": [self._describe_item(task, item) for item in searched.values()],
        }

    def _describe_item(self, task: SuiteTask, item: Item) -> list[Any]:
        reading = task.roles["search"].task
        choices = reading.doc_to_choice(item.document) if reading.config.doc_to_choice else None
        requests = [
            [
                request.request_type,
                request.args,
                *map(_hash_tokens, self._lm.request_tokens(request)),
            ]
            for request in item.requests
        ]
        return [
            requests,
            reading.doc_to_text(item.document),
            reading.doc_to_target(item.document),
            choices,
        ]


def _check_chat(config: SuiteConfig, tokenizer: Any) -> None:
    asked, has = config.chat.apply_chat_template, tokenizer.chat_template
    if not asked:
        return
    if not has:
        raise ConfigError(
            "suite.chat.apply_chat_template: the tokenizer has no chat template. Set it to false, "
            "or take the tokenizer of a model that has one."
        )
    names = sorted(has) if isinstance(has, dict) else []
    if isinstance(asked, str) and asked not in names:
        listed = ", ".join(names) or "one without a name; write true"
        raise ConfigError(
            f"suite.chat.apply_chat_template: the tokenizer has no chat template {asked!r}. It has "
            f"{listed}."
        )


def _fresh(item: Item) -> Item:
    """Return the item with requests that no model has answered."""
    blank = (dataclasses.replace(r, resps=[], filtered_resps={}) for r in item.requests)
    return Item(item.document, tuple(blank))


def _measure(task: SuiteTask, reading: ConfigurableTask, items: Mapping[int, Item]) -> Columns:
    """Return the value of each metric with each filter, by lm-eval's `process_results`."""
    columns: dict[str, dict[int, Value]] = defaultdict(dict)
    for name in next(iter(items.values())).requests[0].filtered_resps:
        for i, item in items.items():
            responses = [request.filtered_resps[name] for request in item.requests]
            for metric, value in reading.process_results(item.document, responses).items():
                columns[f"{metric},{name}"][i] = _value(task, i, f"{metric},{name}", value)
    if task.metric not in columns:
        raise EvaluationError(
            f"task {task.name!r}: its results hold no {task.metric}. They hold "
            f"{', '.join(columns)}."
        )
    return {key: tuple(map(column.get, items)) for key, column in columns.items()}


def _value(task: SuiteTask, i: int, key: str, value: Any) -> Value:
    """Return a metric's value of one item; None where one that does not count is not finite."""
    try:
        found = plain(value)
    except TypeError as error:
        raise EvaluationError(
            f"task {task.name!r} item {i}: {key} cannot be stored ({error})."
        ) from None
    if is_finite(found):
        return found
    if key == task.metric:
        raise NonFiniteError(f"task {task.name!r} item {i}: {key} is {found}.")
    return None


def _loglikelihood(response: Any) -> float:
    return float(response[0] if isinstance(response, tuple) else response)


def _non_finite(request: Instance, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"task {request.task_name!r} item {request.doc_id}: {what} is NaN or Inf. The model's "
        "weights overflow or are broken."
    )


def _hash_tokens(tokens: list[int]) -> str:
    return hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()
