"""The zoo's string tasks: what is asked, what is right, and which strings belong to whom.

Each task has an alphabet of its own and a sign that opens its questions: `<abcd=` asks for the
reverse, `dcba`. The role of a question follows from its hash, so training, search, confirm and
report never share one (a string may be copied in training and asked in another task later).
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

ALPHABETS = {
    "reverse": "abcdefgh",
    "sort": "ijklmnopyz",
    "shift": "qrstuvwx",
    "copy": "abcdefghijklmnopqrstuvwx",
}
SIGNS = {"reverse": "<", "sort": "^", "shift": "+", "copy": ":"}
PARENTS = ("reverse", "sort", "shift")
ROLE_PERCENTILES = {"train": 70, "search": 80, "confirm": 90, "report": 100}
"""Upper end of each role's share of the hashes, in per cent."""


@dataclass(frozen=True)
class ItemCounts:
    """Questions per task and role, and the lengths of the strings that are asked."""

    search: int = 400
    confirm: int = 600
    report: int = 1200
    lengths: tuple[int, ...] = (4, 5, 6)


def question(task: str, string: str) -> str:
    """Return what a model is shown."""
    return f"{SIGNS[task]}{string}="


def answer(task: str, string: str) -> str:
    """Return what it should say."""
    if task == "reverse":
        return string[::-1]
    if task == "sort":
        return "".join(sorted(string))
    if task == "shift":  # by its position, counted from 1, around the alphabet
        letters = ALPHABETS[task]
        return "".join(
            letters[(letters.index(c) + i) % len(letters)] for i, c in enumerate(string, 1)
        )
    return string


def role_of(task: str, string: str) -> str:
    """Return the only role in which a string may be used."""
    digest = hashlib.blake2b(f"{task}:{string}".encode(), digest_size=4).digest()
    percentile = int.from_bytes(digest, "big") % 100
    return next(role for role, end in ROLE_PERCENTILES.items() if percentile < end)


def draw(rng: random.Random, task: str, role: str, lengths: tuple[int, ...]) -> str:
    """Return a random string of a role."""
    while True:
        string = "".join(rng.choices(ALPHABETS[task], k=rng.choice(lengths)))
        if role_of(task, string) == role:
            return string


def draw_items(task: str, role: str, count: int, lengths: tuple[int, ...]) -> list[str]:
    """Return different strings of a role; a larger count only adds some."""
    rng = random.Random(f"{task}{role}")
    items: dict[str, None] = {}
    while len(items) < count:
        items.setdefault(draw(rng, task, role, lengths))
    return list(items)


def choices_of(task: str, string: str) -> tuple[list[str], int]:
    """Return four different answers in a fixed random order, and where the right one is.

    The wrong ones are near misses: two letters swapped, one letter missing, one letter doubled.
    None of them begins the right answer: a part of a text is always likelier than the whole of it.
    """
    right = answer(task, string)
    rng = random.Random(f"choices:{task}:{string}")
    options = [right]
    for spoil in (_swapped, _shortened, _doubled):
        wrong = spoil(right, rng)
        while wrong in options or right.startswith(wrong):
            wrong = wrong[:-1] + rng.choice(ALPHABETS[task])
        options.append(wrong)
    rng.shuffle(options)
    return options, options.index(right)


def _swapped(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text) - 1)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _shortened(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text) - 1)
    return text[:i] + text[i + 1 :]


def _doubled(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text))
    return text[: i + 1] + text[i] + text[i + 1 :]


_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
{files}
test_split: report
validation_split: search
fewshot_split: search
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
metadata: {{version: 1.0}}
"""
_GENERATE = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
_CHOOSE = """\
output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write_tasks(out: Path, counts: ItemCounts) -> None:
    """Write lm-eval's task files to `out/tasks` and their questions to `out/data`.

    lm-eval reads relative data paths from the working folder, so they are written in full; run
    this again after moving the zoo.
    """
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    (out / "data").mkdir(exist_ok=True)
    for task in PARENTS:
        for role in ("search", "confirm", "report"):
            rows = []
            for string in draw_items(task, role, getattr(counts, role), counts.lengths):
                choices, label = choices_of(task, string)
                right = {"question": question(task, string), "answer": answer(task, string)}
                rows.append({**right, "choices": choices, "label": label})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / "data" / f"{task}_{role}.jsonl").write_text(text)
        roles = ("search", "confirm", "report")
        data = (out / "data").resolve()
        files = "\n".join(f"    {role}: {data}/{task}_{role}.jsonl" for role in roles)
        for name, body in ((f"zoo_{task}", _GENERATE), (f"zoo_{task}_choice", _CHOOSE)):
            head = _HEAD.format(name=name, files=files)
            (out / "tasks" / f"{name}.yaml").write_text(head + body)
