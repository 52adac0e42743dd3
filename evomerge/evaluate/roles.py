"""Roles: which documents of a task are for search, confirm and report; none has two roles."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lm_eval.api.task import ConfigurableTask

from evomerge.config.suite import ROLES, ItemRole, SuiteConfig, TaskConfig
from evomerge.errors import ConfigError
from evomerge.evaluate.catalog import Catalog
from evomerge.evaluate.items import Strata, content_hash, draw_order, draw_roles, first_copies
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
    """

    task: ConfigurableTask
    split: str
    ids: tuple[int, ...]
    strata: Strata
    contents: tuple[str, ...]


def assign_roles(
    where: str,
    entry: TaskConfig,
    task: ConfigurableTask,
    config: SuiteConfig,
    catalog: Catalog,
    problems: list[str],
) -> dict[ItemRole, RolePart]:
    """Give each role its items of one task, split by split.

    Args:
        where: Place of the task in the config, `suite.tasks[1]`.
        entry: What the suite says of the task.
        task: lm-eval's task with the suite's settings, reading its own evaluation split.
        config: The suite.
        catalog: Loads the task again for roles that read another split.
        problems: Gets a line for each problem; the roles it is about are left out.
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
            reading = task if split == own else _reading(split, entry.task, task, catalog)
        except ConfigError as error:
            problems.append(f"suite.items: split {split!r}: {error}")
            continue
        if split != own:
            problems.extend(f"{where}.{problem}" for problem in apply_settings(reading, entry))
        roles |= _draw(entry.task, reading, split, counts, config, problems)
    problems.extend(_leakage(entry.task, roles))
    return roles


def _reading(split: str, name: str, task: ConfigurableTask, catalog: Catalog) -> ConfigurableTask:
    """Return the task with another evaluation split; its few-shot examples stay the same."""
    shown = task.fewshot_cfg
    changes = {"test_split": split}
    default = task.config.training_split or task.config.validation_split
    if shown.split is None and shown.samples is None and split == default:
        # lm-eval keeps a question out of its own examples only if the split of those is named
        changes["fewshot_split"] = split
    return catalog.load(name, changes)


def _draw(
    name: str,
    task: ConfigurableTask,
    split: str,
    counts: Mapping[ItemRole, int | None],
    config: SuiteConfig,
    problems: list[str],
) -> dict[ItemRole, RolePart]:
    documents = list(task.eval_docs)
    field = config.items.stratify
    if field is not None and field not in documents[0]:
        problems.append(
            f"suite.items.stratify: the documents of task {name!r} have no field "
            f"{field!r}.{did_you_mean(field, documents[0])}"
        )
        return {}
    contents = [content_hash(document) for document in documents]
    # roles that share a split must not get two copies of one document
    ids = first_copies(contents) if len(counts) > 1 else list(range(len(documents)))
    problem = _shortage(name, split, counts, len(ids), len(documents) - len(ids))
    if problem:
        problems.append(problem)
        return {}
    values = {i: str(documents[i].get(field)) if field else "" for i in ids}
    order = draw_order(_strata(ids, values), stream_seed(config.items.seed, "items", name, split))
    return {
        role: RolePart(
            task, split, tuple(drawn), _strata(drawn, values), tuple(contents[i] for i in drawn)
        )
        for role, drawn in draw_roles(order, counts).items()
    }


def _shortage(
    name: str, split: str, counts: Mapping[ItemRole, int | None], available: int, copies: int
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
    without = f" (without {copies} copies of other documents)" if copies else ""
    return (
        f"suite.items: task {name!r} has {available} items in split {split!r}{without}, {listed} "
        "are asked for. Lower a count, or give a role another split."
    )


def _strata(ids: Iterable[int], values: Mapping[int, str]) -> dict[str, list[int]]:
    strata: dict[str, list[int]] = {}
    for i in ids:
        strata.setdefault(values[i], []).append(i)
    return strata


def _leakage(name: str, roles: Mapping[ItemRole, RolePart]) -> list[str]:
    """Return a sentence for each pair of roles that use the same documents, from two splits."""
    problems = []
    present = [role for role in ROLES if role in roles]
    for a, first in enumerate(present):
        for second in present[a + 1 :]:
            shared = set(roles[first].contents).intersection(roles[second].contents)
            if shared:
                where = " and ".join(f"{r} (split {roles[r].split!r})" for r in (first, second))
                problems.append(
                    f"suite.items: task {name!r}: {where} use {len(shared)} of the same documents, "
                    "which is leakage. Draw both from one split, or remove the copies from the "
                    "data."
                )
    return problems
