"""Leakage: items that chose the winner and then judge it, or that are a benchmark's own test.

Refused, unless the suite says `leakage: allow`; then each finding is a sentence that the study
keeps. What is not found: a benchmark under a name of the user's own with data in local files, items
told in other words or with their choices in another order, and whatever the models were trained on.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evomerge.config.suite import ROLES, ItemRole
from evomerge.evaluate.roles import RolePart

BENCHMARKS = (
    "agieval|ai2_arc|aime|anli|arc|asdiv|bbh|belebele|bigbench|blimp|boolq|ceval|cmmlu|"
    "commonsense_qa|copa|coqa|crows_pairs|csqa|drop|eq_bench|gpqa|gsm8k|gsm_plus|headqa|"
    "hellaswag|hendrycks_ethics|hendrycks_math|hendrycks_test|humaneval|ifeval|kobest|lambada|"
    "livebench|logiqa|longbench|math|math_qa|mathqa|mbpp|medmcqa|medqa|mgsm|minerva_math|mmlu|"
    "mmmlu|mnli|mrpc|musr|nq_open|openbookqa|pawsx|piqa|pubmedqa|qnli|qqp|race|rte|sciq|"
    "social_iqa|siqa|squad|sst2|storycloze|swag|toxigen|triviaqa|truthful_qa|truthfulqa|webqs|"
    "wic|wikitext|winogrande|wnli|wsc|wsc273|xcopa|xnli|xquad|xstorycloze|xwinograd"
)
"""Benchmarks whose scores are published, as the names of lm-eval's tasks and of data sets begin."""

_FAMILIES = "leaderboard_|tiny|global_|multilingual_|arabic_|super_glue_|glue_|lm_eval_"
_KNOWN = re.compile(rf"(?:{_FAMILIES})?({BENCHMARKS})(?![a-z0-9])", re.IGNORECASE)
_CHOOSING: tuple[ItemRole, ...] = ("search", "confirm")


@dataclass(frozen=True)
class Tested:
    """A task of the suite as far as leakage goes.

    Attributes:
        where: Its place in the config, `suite.tasks[1]`.
        name: Its name.
        data: Name of its data set, as its file says.
        own_split: The split that lm-eval scores it on.
        splits: All its splits.
        roles: Its items by role.
    """

    where: str
    name: str
    data: str
    own_split: str | None
    splits: Sequence[str]
    roles: dict[ItemRole, RolePart]


@dataclass(frozen=True)
class Leak:
    """One finding.

    Attributes:
        where: The field of the config it is about.
        what: What leaks, as half a sentence.
        advice: What to do, as half a sentence.
    """

    where: str
    what: str
    advice: str

    @property
    def refusal(self) -> str:
        """The sentence of an error."""
        return (
            f"{self.where}: {self.what}. {self.advice}, or set suite.leakage: allow, and the study "
            "will say so."
        )


def find_leaks(tasks: Sequence[Tested]) -> list[Leak]:
    """Return what leaks between a suite's roles, and from its benchmarks' own test splits."""
    tested = [leak for task in tasks for leak in _chosen_on_tests(task)]
    return [*tested, *_in_two_roles(tasks)]


def benchmark_of(task: str, data: str) -> str | None:
    """Return the well-known benchmark that a task is of, by its name or its data set's; else None.

    Args:
        task: Name of the task, `leaderboard_gpqa_main`.
        data: Name of its data set, `openai/gsm8k`.
    """
    found = _KNOWN.match(task) or _KNOWN.match(data.rpartition("/")[2])
    return found.group(1).lower() if found else None


def _chosen_on_tests(task: Tested) -> Iterator[Leak]:
    """Yield a leak for each split of a benchmark's test that search or confirm take items from.

    That split is the one that lm-eval scores: some benchmarks keep the answers of theirs to
    themselves, and are scored on `validation` or even `train` everywhere.
    """
    known = benchmark_of(task.name, task.data)
    if known is None:
        return
    for split in dict.fromkeys((task.own_split, "test")):
        roles = [r for r in _CHOOSING if r in task.roles and task.roles[r].split == split]
        if roles:
            number = sum(len(task.roles[role].ids) for role in roles)
            others = [s for s in task.splits if s not in (task.own_split, "test")]
            have = f"; it has {', '.join(others)}" if others else ""
            yield Leak(
                task.where,
                f"task {task.name!r}: {' and '.join(roles)} would choose the winner on {number} "
                f"items of split {split!r}, on which scores of {known} are published",
                f"Give {' and '.join(f'suite.items.{r}.split' for r in roles)} another split{have}",
            )


def _in_two_roles(tasks: Sequence[Tested]) -> Iterator[Leak]:
    """Yield a leak for each two roles, of one task or two, that have items in common."""
    parts = [(t, role, t.roles[role]) for role in ROLES for t in tasks if role in t.roles]
    texts = [dict(zip(part.texts, part.ids, strict=True)) for _, _, part in parts]
    for a, (first, one, part) in enumerate(parts):
        for b, (second, other, later) in enumerate(parts[:a]):
            shared = [text for text in part.texts if text in texts[b]]
            if one == other or not shared:
                continue
            places = (
                f"{other} (split {later.split!r})",
                f"{one} (split {part.split!r})",
            )
            names = (
                f"task {first.name!r}: {places[0]} and {places[1]}"
                if first is second
                else f"{places[0]} of task {second.name!r} and {places[1]} of task {first.name!r}"
            )
            example = f"e.g. items {texts[b][shared[0]]} and {texts[a][shared[0]]}"
            yield Leak(
                first.where,
                f"{names} have {len(set(shared))} items in common, {example}",
                _advice(first is second, part.split == later.split),
            )


def _advice(same_task: bool, same_split: bool) -> str:
    if same_task:
        return "Draw both from one split, which leaves copies out, or remove them from the data"
    if same_split:
        return "Give each role a split of its own, or leave one of the tasks out"
    return "Remove the copies from the data, or leave one of the tasks out"
