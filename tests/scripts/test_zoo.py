"""The zoo's strings, roles and files; its fairness is measured by benchmarks/zoo_world.py."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import make_zoo
import zoo_tasks

ROLES = ("search", "confirm", "report")


@pytest.mark.parametrize(
    ("task", "string", "answer"),
    [
        ("reverse", "abch", "hcba"),
        ("sort", "zipj", "ijpz"),
        ("shift", "qqqx", "rstt"),  # the i-th letter moves i places, around the alphabet's end
        ("copy", "aqz", "aqz"),
    ],
)
def test_answers(task, string, answer):
    assert zoo_tasks.answer(task, string) == answer


@pytest.mark.parametrize("task", zoo_tasks.PARENTS)
def test_no_string_has_two_roles_and_none_is_trained_on(task):
    items = {role: set(zoo_tasks.draw_items(task, role, 300, (4, 5, 6))) for role in ROLES}
    assert all(len(strings) == 300 for strings in items.values())
    assert not items["search"] & items["confirm"]
    assert not items["search"] & items["report"]
    assert not items["confirm"] & items["report"]
    assert all(zoo_tasks.role_of(task, s) == role for role, ss in items.items() for s in ss)


def test_choices_are_four_and_one_is_right():
    lengths = set()
    for string in zoo_tasks.draw_items("sort", "search", 100, (4, 5, 6)):
        options, label = zoo_tasks.choices_of("sort", string)
        assert len(set(options)) == 4
        assert options[label] == "".join(sorted(string))
        lengths |= {len(option) - len(string) for option in options}
        assert zoo_tasks.choices_of("sort", string) == (options, label)
    assert lengths == {-1, 0, 1}, "lengths differ, so that acc_norm is not acc"


@pytest.mark.parametrize("task", zoo_tasks.PARENTS)
def test_no_wrong_choice_begins_the_right_one(task):
    """A part of an answer is always likelier than the whole: `acc` would be 0 for every model."""
    for string in [
        *zoo_tasks.draw_items(task, "search", 300, (4, 5, 6)),
        zoo_tasks.ALPHABETS[task][0] * 4,
    ]:
        options, label = zoo_tasks.choices_of(task, string)
        assert len(set(options)) == 4
        assert [o for o in options if options[label].startswith(o)] == [options[label]]


def test_batches_ask_what_the_tasks_ask(tmp_path):
    """What a model is trained on is, token for token, what lm-eval shows it and wants from it."""
    import random

    settings = make_zoo.Settings(batch_size=8)
    tokens, targets = make_zoo.make_batch(random.Random(0), {"reverse": 1.0}, settings)
    tokenizer = make_zoo.make_tokenizer()
    for row, target in zip(tokens, targets, strict=True):
        said = target[target >= 0]
        text = tokenizer.decode(row[row > 2], skip_special_tokens=False).replace(" ", "")
        asked, answer = text.split("=")
        assert answer == asked[1:][::-1]
        assert tokenizer.decode(said[:-1]).replace(" ", "") == answer
        assert said[-1] == tokenizer.eos_token_id
        prompt = tokenizer(f"{asked}=")["input_ids"]
        assert row[: len(prompt)].tolist() == prompt


def test_tasks_are_written_for_lm_eval(tmp_path):
    from lm_eval.tasks import TaskManager

    counts = zoo_tasks.ItemCounts(search=5, confirm=6, report=7)
    zoo_tasks.write_tasks(tmp_path, counts)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    names = [f"zoo_{t}{kind}" for t in zoo_tasks.PARENTS for kind in ("", "_choice")]
    tasks = manager.load(names)["tasks"]
    assert sorted(tasks) == sorted(names)
    for name, task in tasks.items():
        assert {r: len(task.dataset[r]) for r in ROLES} == {"search": 5, "confirm": 6, "report": 7}
        document = task.dataset["search"][0]
        assert task.doc_to_text(document) == document["question"]
        if name.endswith("_choice"):
            assert task.doc_to_choice(document)[task.doc_to_target(document)] == document["answer"]


def test_models_are_kept_while_the_settings_stay_and_a_half_made_zoo_is_none(tmp_path, monkeypatch):
    quick = make_zoo.Settings(
        hidden_size=16, intermediate_size=16, num_layers=1, batch_size=2,
        base=make_zoo.Training({"copy": 1.0}, 2, 1e-3, 0),
        parents={"sort": make_zoo.Training({"sort": 1.0}, 2, 1e-3, 1)},
    )  # fmt: skip
    out = tmp_path / "zoo"
    with torch.random.fork_rng(devices=[]):
        monkeypatch.setattr(make_zoo, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_zoo.make_models(out, quick)
        assert not make_zoo.is_made(out, quick)
        monkeypatch.undo()
        make_zoo.make_models(out, quick)
    assert make_zoo.is_made(out, quick)
    assert not make_zoo.is_made(out, make_zoo.Settings())
    assert sorted(json.loads((out / "zoo.json").read_text())["models"]) == ["base", "sort"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, sort = (AutoModelForCausalLM.from_pretrained(out / n) for n in ("base", "sort"))
    assert not torch.equal(base.model.embed_tokens.weight, sort.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(out / "sort")("<ab=")["input_ids"][0] == 1


def test_a_folder_that_is_no_zoo_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(SystemExit, match="is no zoo"):
        make_zoo.make_models(tmp_path, make_zoo.Settings())
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_a_zoo_that_lost_a_model_is_not_whole(tmp_path):
    settings = make_zoo.Settings()
    (tmp_path / "zoo.json").write_text(json.dumps({"digest": settings.digest}))
    for name in ("base", *settings.parents):
        assert not make_zoo.is_made(tmp_path, settings)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert make_zoo.is_made(tmp_path, settings)


def interrupted(model, folder):
    folder.mkdir(parents=True)
    raise KeyboardInterrupt
