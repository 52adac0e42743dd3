"""Chunks go to workers; what comes of a candidate does not depend on who does what, or when."""

import random

import pytest

from evomerge.config.recipe import Recipe, Source
from evomerge.evaluate.evaluator import Chunk, TaskItems
from evomerge.study.items import ScoredChunk
from evomerge.study.schedule import MAX_ATTEMPTS, Schedule
from evomerge.workers.job import Outcome

CHUNKS = tuple(Chunk("search", i, {"t": (2 * i, 2 * i + 1)}) for i in range(3))


def recipe(weight):
    source = Source(model={"path": "a/b"}, parameters={"weight": float(weight)})
    return Recipe(merge_method="linear", models=(source,))


def done(job, worker="w", digest=None):
    items = job.chunk.items["t"]
    scores = TaskItems(items, {"acc,none": tuple(float(i + 10 * job.trial) for i in items)})
    return Outcome(job, "done", worker, {"t": scores}, digest or f"d{job.trial}", 0.1, 0.2)


def failed(job, kind):
    return Outcome(job, kind, "w", error="it broke")


def schedule_of(trials):
    schedule = Schedule()
    for trial in trials:
        schedule.add(trial, recipe(trial), CHUNKS, {})
    return schedule


def test_a_worker_stays_with_its_candidate_and_the_next_takes_a_fresh_one():
    schedule = schedule_of([5, 6])
    first, second = schedule.next_job("a"), schedule.next_job("b")
    assert (first.trial, second.trial) == (5, 6)
    schedule.settle(done(first))
    assert schedule.next_job("a").trial == 5
    schedule.settle(done(second))
    assert schedule.next_job("b").trial == 6


def test_idle_workers_share_the_last_candidates_chunks():
    schedule = schedule_of([5])
    jobs = [schedule.next_job(worker) for worker in ("a", "b", "c", "d")]
    assert [job and job.chunk.index for job in jobs] == [0, 1, 2, None]


@pytest.mark.parametrize("seed", range(20))
def test_every_chunk_is_scored_once_whatever_the_timing(seed):
    rng = random.Random(seed)
    schedule, running, taken, results = schedule_of(range(4)), [], [], {}
    while len(schedule):
        for worker in rng.sample("abcde", rng.randint(1, 5)):
            if worker not in [w for w, _ in running] and (job := schedule.next_job(worker)):
                running.append((worker, job))
        worker, job = running.pop(rng.randrange(len(running)))
        taken.append((job.trial, job.chunk.index))
        schedule.settle(done(job, worker))
        for trial in schedule.over():
            results[trial] = schedule.take(trial)
    assert sorted(taken) == [(t, c) for t in range(4) for c in range(3)]
    for trial, scored in results.items():
        assert scored.state == "done"
        assert scored.result["t"].ids == (0, 1, 2, 3, 4, 5)
        assert scored.result["t"].values["acc,none"] == tuple(
            float(i + 10 * trial) for i in range(6)
        )


def test_known_chunks_are_not_scored_again():
    schedule = Schedule()
    known = {
        i: ScoredChunk(
            i, {"t": TaskItems(CHUNKS[i].items["t"], {"acc,none": (1.0, 1.0)})}, "d", "w", 0, 0
        )
        for i in (0, 2)
    }
    schedule.add(1, recipe(1), CHUNKS, known)
    job = schedule.next_job("a")
    assert job.chunk.index == 1
    assert schedule.next_job("b") is None
    schedule.settle(
        Outcome(job, "done", "a", {"t": TaskItems((2, 3), {"acc,none": (0.0, 0.0)})}, "d")
    )
    assert schedule.take(1).result["t"].values["acc,none"] == (1.0, 1.0, 0.0, 0.0, 1.0, 1.0)


def test_a_candidate_whose_chunks_are_all_known_is_over_at_once():
    schedule = Schedule()
    schedule.add(1, recipe(1), (), {})
    assert schedule.over() == [1]


@pytest.mark.parametrize("kind", ["failed", "invalid"])
def test_a_failure_ends_the_candidate_and_waits_for_its_running_chunks(kind):
    schedule = schedule_of([5])
    first, second = schedule.next_job("a"), schedule.next_job("b")
    schedule.settle(failed(first, kind))
    assert schedule.over() == []
    assert schedule.next_job("c") is None, "nothing more of it is begun"
    schedule.settle(done(second))
    scored = schedule.take(5)
    assert (scored.state, scored.error, scored.result) == (kind, "it broke", None)


def test_a_lost_job_is_tried_again_and_given_up_after_three():
    schedule = schedule_of([5])
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job = schedule.next_job("a")
        assert (job.chunk.index, job.attempt) == (0, attempt)
        schedule.settle(failed(job, "lost"))
    scored = schedule.take(5)
    assert scored.state == "failed"
    assert scored.error == "lost 3 times (last: it broke)"
    assert scored.attempt == MAX_ATTEMPTS


def test_workers_that_make_different_weights_of_one_recipe_are_found_out():
    schedule = schedule_of([5])
    jobs = [schedule.next_job(worker) for worker in "abc"]
    for job, digest in zip(jobs, ("x", "x", "y"), strict=True):
        schedule.settle(done(job, digest=digest))
    scored = schedule.take(5)
    assert scored.state == "failed"
    assert "different weights of one recipe" in scored.error
