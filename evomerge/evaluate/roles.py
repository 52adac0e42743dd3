"""Roles: which documents of a task are for search, confirm and report; none has two roles."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import ConfigurableTask

from evomerge.config.suite import ROLES, ItemRole, SuiteConfig, TaskConfig
from evomerge.errors import ConfigError
from evomerge.evaluate.catalog import Catalog
from evomerge.evaluate.items import (
    Strata,
    content_hash,
    draw_order,
    draw_roles,
    first_copies,
    text_hash,
)
from evomerge.evaluate.settings import apply_settings
from evomerge.registry import did_you_mean
from evomerge.seeds import stream_seed


@dataclass(frozen=True)
class RolePart:
    """A task's items of one role.

    Attributes:
        task: lm-eval's task, reading the role's split.
        split: Name of the data split.
        ids: Document numbers within the split, ascending.
        strata: The same, by the value of the field that draws are stratified by.
        contents: Hash of each document, in the order of `ids`.
        texts: The same, equal for documents that are nearly equal (`text_hash`).
    """

    task: ConfigurableTask
    split: str
    ids: tuple[int, ...]
    strata: Strata
    contents: tuple[str, ...]
    texts: tuple[str, ...]


def assign_roles(
    where: str,
    entry: TaskConfig,
    task: ConfigurableTask,
    config: SuiteConfig,
    catalog: Catalog,
    problems: list[str],
    used: Mapping[str, Collection[int]],
) -> dict[ItemRole, RolePart]:
    """Give each role its items of one task, split by split.

    Args:
        where: Place of the task in the config, `suite.tasks[1]`.
        entry: What the suite says of the task.
        task: lm-eval's task with the suite's settings, reading its own evaluation split.
        config: The suite.
        catalog: Loads the task again for roles that read another split.
        problems: Gets a line for each problem; the roles it is about are left out.
        used: By split, what confirmations have used. Where too few others are left for confirm and
            report, both get none.
    """
    own = task.config.test_split or task.config.validation_split
    sharing: dict[str, dict[ItemRole, int | None]] = {}
    for role in ROLES:
        asked = getattr(config.items, role)
        if asked.count == 0:
            continue
        split = asked.split or own
        if split not in task.dataset:
            problems.append(
                f"suite.items.{role}.split: task {entry.task!r} has no split {split!r}. It has "
                f"{', '.join(task.dataset)}."
            )
        else:
            sharing.setdefault(split, {})[role] = asked.count
    roles: dict[ItemRole, RolePart] = {}
    for split, counts in sharing.items():
        try:
            as_it_is = split == own and _keeps_questions_out(task)
            reading = task if as_it_is else _reading(split, entry.task, task, catalog)
        except ConfigError as error:
            problems.append(f"suite.items: split {split!r}: {error}")
            continue
        if reading is not task:
            problems.extend(f"{where}.{problem}" for problem in apply_settings(reading, entry))
        taken = frozenset(used.get(split, ()))
        roles |= _draw(entry.task, reading, split, counts, config, problems, taken)
    return roles


def _reading(split: str, name: str, task: ConfigurableTask, catalog: Catalog) -> ConfigurableTask:
    """Return the task with another evaluation split; its few-shot examples stay the same."""
    changes = {"test_split": split}
    if split == _split_shown(task):
        # lm-eval keeps a question out of its own examples only if the split of those is named
        changes["fewshot_split"] = split
    return catalog.load(name, changes)


def _split_shown(task: ConfigurableTask) -> str | None:
    """Return the split that few-shot examples come from; None for examples of the task's file."""
    shown, config = task.fewshot_cfg, task.config
    if shown.split is not None or shown.samples is not None:
        return shown.split
    return config.training_split or config.validation_split or config.test_split


def _keeps_questions_out(task: ConfigurableTask) -> bool:
    """Whether lm-eval shows no question of the task's own split as its own example.

    It compares names of splits: where the examples' is named and is the test split, the question is
    taken out; a task without a test split, scored on the validation split that it also shows, is
    not noticed.
    """
    shown, config = _split_shown(task), task.config
    if not config.num_fewshot or shown != (config.test_split or config.validation_split):
        return True
    return bool(task.fewshot_cfg.split == config.test_split)


def _among_examples(task: ConfigurableTask, documents: list[Any], texts: list[str]) -> set[int]:
    """Return the documents of which a copy may be shown with its answer as a few-shot example."""
    if not task.config.num_fewshot or not hasattr(task, "sampler"):
        return set()
    left_out = task.fewshot_cfg.split == task.config.test_split  # by lm-eval, the document itself
    asked, shown = set(texts), defaultdict[str, list[Any]](list)
    for example in task.sampler.fewshot_docs():
        if (text := text_hash(example)) in asked:
            shown[text].append(example)
    return {
        i
        for i, (document, text) in enumerate(zip(documents, texts, strict=True))
        if any(not (left_out and example == document) for example in shown.get(text, ()))
    }


def _draw(
    name: str,
    task: ConfigurableTask,
    split: str,
    counts: Mapping[ItemRole, int | None],
    config: SuiteConfig,
    problems: list[str],
    used: Collection[int],
) -> dict[ItemRole, RolePart]:
    documents = list(task.eval_docs)
    field = config.items.stratify
    if field is not None and field not in documents[0]:
        problems.append(
            f"suite.items.stratify: the documents of task {name!r} have no field "
            f"{field!r}.{did_you_mean(field, documents[0])}"
        )
        return {}
    texts = [text_hash(document) for document in documents]
    # roles that share a split must not get two copies of one document
    firsts = first_copies(texts) if len(counts) > 1 else list(range(len(documents)))
    shown = _among_examples(task, documents, texts)
    ids = [i for i in firsts if i not in shown]
    left_out = (len(documents) - len(firsts), len(firsts) - len(ids))
    problem = _shortage(name, split, counts, len(ids), left_out)
    if problem:
        problems.append(problem)
        return {}
    values = {i: str(documents[i].get(field)) if field else "" for i in ids}
    order = draw_order(_strata(ids, values), stream_seed(config.items.seed, "items", name, split))
    gone = {texts[i] for i in used if i < len(texts)}
    return {
        role: RolePart(
            task,
            split,
            tuple(drawn),
            _strata(drawn, values),
            tuple(content_hash(documents[i]) for i in drawn),
            tuple(texts[i] for i in drawn),
        )
        for role, drawn in _unused(order, counts, [i for i in ids if texts[i] in gone]).items()
    }


def _unused(
    order: Sequence[int], counts: Mapping[ItemRole, int | None], used: Collection[int]
) -> dict[ItemRole, list[int]]:
    """Draw the roles; where some documents are used, confirm and report from the others.

    Search keeps what it had. Of the roles that find too few others left, none gets any.
    """
    drawn = draw_roles(order, counts)
    if not used:
        return drawn
    searched = drawn.get("search", [])
    left = [i for i in order if i not in {*searched, *used}]
    others: dict[ItemRole, int | None] = {
        role: count for role, count in counts.items() if role != "search"
    }
    # all that are left may be none
    enough = sum(1 if count is None else count for count in others.values()) <= len(left)
    kept: dict[ItemRole, list[int]] = {"search": searched} if "search" in counts else {}
    return kept | (draw_roles(left, others) if enough else {})


def _shortage(
    name: str,
    split: str,
    counts: Mapping[ItemRole, int | None],
    available: int,
    left_out: tuple[int, int],
) -> str | None:
    all_left = [role for role, count in counts.items() if count is None]
    if len(all_left) > 1:
        return (
            f"suite.items: {' and '.join(all_left)} both take all that is left of split {split!r} "
            f"of task {name!r}. Give one of them a count or another split."
        )
    asked = sum(count or 0 for count in counts.values())
    if asked + len(all_left) <= available:
        return None
    listed = " + ".join(f"{role} {'the rest' if n is None else n}" for role, n in counts.items())
    copies, shown = left_out
    reasons = [f"{copies} copies of other documents"] if copies else []
    reasons += [f"{shown} that may be shown as examples"] if shown else []
    without = f" (without {' and '.join(reasons)})" if reasons else ""
    return (
        f"suite.items: task {name!r} has {available} items in split {split!r}{without}, {listed} "
        "are asked for. Lower a count, or give a role another split."
    )


def _strata(ids: Iterable[int], values: Mapping[int, str]) -> dict[str, list[int]]:
    strata: dict[str, list[int]] = {}
    for i in ids:
        strata.setdefault(values[i], []).append(i)
    return strata
