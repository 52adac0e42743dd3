"""Suites over the tiny tasks, and stock lm-eval on the same weights."""

import json

import lm_eval.evaluator
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.config.strict import Origin, validate
from evomerge.config.suite import SuiteConfig
from evomerge.evaluate.harness import Harness
from evomerge.evaluate.tasks import load_tasks
from tests.tiny import write_tasks

CHOICE = {"task": "tiny_choice", "metric": "acc"}
ANSWER = {"task": "tiny_answer", "metric": "exact_match,first"}
TEXT = {"task": "tiny_text", "metric": "byte_perplexity"}


def make_suite(folder, *tasks, **settings):
    """A suite as if read from YAML; 12 search and 8 confirm items of each task by default."""
    data = {
        "tasks": list(tasks or (CHOICE, ANSWER, TEXT)),
        "include_path": folder,
        "items": {"search": 12, "confirm": 8},
        "chunks": 3,
        "batch_size": 4,
        **settings,
    }
    return validate(SuiteConfig, json.loads(json.dumps(data)), Origin("<test>"))


def make_harness(config, model, tokenizer):
    return Harness(load_tasks(config), config, model, tokenizer)


def rewrite(tmp_path, file, *changes):
    """The tiny tasks with changes, (old, new), in one file."""
    folder = write_tasks(tmp_path)
    text = (tmp_path / file).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / file).write_text(text)
    return folder


def run_stock(folder, model, tokenizer, tasks, **settings):
    """lm-eval's `simple_evaluate`, but for the seconds it spends on describing this machine."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        return lm_eval.evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            **settings,
        )
