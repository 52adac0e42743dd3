"""Prompts: the requests of a task's items, equal to those of a run of lm-eval over the split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from evomerge.config.suite import ChatConfig


@dataclass(frozen=True)
class Item:
    """One document of a task and its requests, in lm-eval's order."""

    document: dict[str, Any]
    requests: tuple[Instance, ...]


def build_items(
    task: ConfigurableTask,
    ids: Sequence[int],
    fewshot_seed: int,
    chat: ChatConfig,
    chat_template: Callable[..., str],
) -> dict[int, Item]:
    """Build the requests of some documents.

    Few-shot examples are drawn for every document before the last one that is wanted, so that each
    gets the examples it has in a run over all of them.

    Args:
        task: lm-eval's task; its generator of few-shot draws is set to the seed and used.
        ids: Document numbers, ascending.
        fewshot_seed: Seed of the few-shot draws.
        chat: How prompts are dressed.
        chat_template: Renders a list of messages, as `HFLM.apply_chat_template`.

    Returns:
        For each document number, its document and requests.
    """
    task.set_fewshot_seed(fewshot_seed)
    wanted, items = set(ids), {}
    for i, document in enumerate(list(task.eval_docs)[: ids[-1] + 1]):
        if i in wanted:
            items[i] = Item(document, _requests(task, i, document, chat, chat_template))
        elif task.config.num_fewshot:
            _skip_draw(task, document)
    return items


def _requests(
    task: ConfigurableTask,
    i: int,
    document: dict[str, Any],
    chat: ChatConfig,
    chat_template: Callable[..., str],
) -> tuple[Instance, ...]:
    # the two calls of lm-eval's build_all_requests for one document
    dressed = bool(chat.apply_chat_template)
    context = task.fewshot_context(
        document,
        num_fewshot=task.config.num_fewshot,
        system_instruction=chat.system_instruction,
        apply_chat_template=dressed,
        fewshot_as_multiturn=chat.fewshot_as_multiturn,
        chat_template=chat_template if dressed else None,
        gen_prefix=task.doc_to_prefix(document),
    )
    requests = task.construct_requests(
        doc=document,
        ctx=context,
        metadata=(task.config.task, i, task.config.repeats),
        apply_chat_template=dressed,
        chat_template=chat_template if dressed else None,
    )
    return tuple(requests) if isinstance(requests, list) else (requests,)


def _skip_draw(task: ConfigurableTask, document: dict[str, Any]) -> None:
    """Draw the few-shot examples of a document without rendering them, which is what takes time."""
    drawn_from_evaluated = task.fewshot_cfg.split == task.config.test_split
    task.sampler.sample(
        n=task.config.num_fewshot, eval_doc=document if drawn_from_evaluated else None
    )


class Remembered:
    """A field of a task as a function that renders each document once.

    Scoring asks for the same targets and choices for every candidate, and lm-eval compiles their
    template each time. It takes a function wherever it takes a template.
    """

    def __init__(self, task: ConfigurableTask, field: str) -> None:
        self._task, self._field = task, field
        self._template = getattr(task.config, field)
        self._values: dict[int, tuple[Any, Any]] = {}

    def __call__(self, document: dict[str, Any]) -> Any:
        """Return what the task's own field gives for the document."""
        known = self._values.get(id(document))
        if known is None:
            render = getattr(ConfigurableTask, self._field)
            # the document is kept with its value, so that its id is never another's
            known = self._values[id(document)] = (
                document,
                render(self._task, document, self._template),
            )
        return known[1]


def remember_targets(task: ConfigurableTask) -> None:
    """Let a task render the text, target and choices of a document once."""
    for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        if isinstance(getattr(task.config, field), str) and task.prompt is None:
            task.set_config(field, Remembered(task, field))
