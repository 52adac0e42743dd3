"""A model that takes too long is cut off; nothing else of an evaluation changes."""

import pytest
import torch

from evomerge.errors import ConfigError, EvaluationError
from evomerge.evaluate.harness import Harness
from evomerge.evaluate.tasks import load_tasks
from tests.evaluate.helpers import ANSWER, CHOICE, TEXT, make_suite
from tests.tiny import make_model


class TickingClock:
    """Every look at it is so many seconds after the one before."""

    def __init__(self, tick_s):
        self.tick_s, self.now_s = tick_s, 0.0

    def __call__(self):
        self.now_s += self.tick_s
        return self.now_s


def endless(generation):
    """Answers that go on until their tokens are used up: no text ends them, nor does the model."""
    return {**ANSWER, "generation": {"until": ["@"], "min_new_tokens": 40, **generation}}


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture
def passes(model):
    """Counts forward passes."""
    count = []
    hook = model.register_forward_hook(lambda *_: count.append(1))
    yield count
    hook.remove()


def timed(config, model, tokenizer, clock):
    return Harness(load_tasks(config), config, model, tokenizer, clock)


def test_a_generation_that_does_not_end_is_cut_off(folder, tokenizer, model, passes):
    suite = make_suite(folder, endless({"max_gen_toks": 40}), time_limit=10, chunks=1)
    harness = timed(suite, model, tokenizer, TickingClock(1.0))
    with pytest.raises(EvaluationError) as caught:
        harness.score(model, harness.chunks("search")[0])
    assert len(passes) == 10, "between two tokens of the first batch"
    assert str(caught.value) == (
        "search chunk 0: not done after 11.0 s, suite.time_limit allows 10 s. Raise it if "
        "candidates as slow as this one are wanted."
    )
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("path", ["packed", "lm_eval"])
@pytest.mark.parametrize("task", [CHOICE, TEXT], ids=["choice", "text"])
def test_loglikelihoods_are_cut_off_between_batches(task, path, folder, tokenizer, model, passes):
    settings = {"time_limit": 2, "chunks": 1, "batch_size": 2, "loglikelihood": path}
    harness = timed(make_suite(folder, task, **settings), model, tokenizer, TickingClock(1.0))
    passes.clear()  # of the choice of the path
    with pytest.raises(EvaluationError, match=r"^search chunk 0: not done after 3\.0 s, "):
        harness.score(model, harness.chunks("search")[0])
    assert len(passes) == 2
    assert not model._forward_pre_hooks


def test_a_limit_that_is_far_away_changes_nothing(folder, tokenizer, model):
    free, bound = (make_suite(folder, time_limit=limit) for limit in (None, 1e6))
    harness = timed(free, model, tokenizer, clock=None)  # nobody looks at it
    limited = timed(bound, model, tokenizer, TickingClock(1.0))
    assert limited.facts() == harness.facts(), "a study may change it"
    drawn = torch.random.get_rng_state()
    for role in ("search", "confirm"):
        for chunk in harness.chunks(role):
            assert limited.score(model, chunk) == harness.score(model, chunk)
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_each_chunk_has_its_own_time(folder, tokenizer, model):
    """What was cut off leaves no trace in what is scored after it."""
    free = timed(make_suite(folder), model, tokenizer, clock=None)
    expected = [free.score(model, chunk) for chunk in free.chunks("search")]
    clock = TickingClock(0.0)
    harness = timed(make_suite(folder, time_limit=1), model, tokenizer, clock)
    first, second, third = harness.chunks("search")
    for chunk, before in ((first, 0), (second, 1), (third, 2)):
        clock.tick_s = 0.8
        with pytest.raises(EvaluationError, match=rf"^search chunk {before}: not done after 1\.6"):
            harness.score(model, chunk)
        clock.tick_s = 0.0
        assert harness.score(model, chunk) == expected[before]


@pytest.mark.parametrize("limit", [0, -1, float("inf"), "1 h"], ids=str)
def test_what_a_limit_may_not_be(limit, folder):
    with pytest.raises(ConfigError, match="time_limit"):
        make_suite(folder, time_limit=limit)
