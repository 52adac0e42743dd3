"""Whole searches on a real Ray cluster: workers and drivers are killed, and only time is lost."""

import os
import signal

import pytest

from evomerge.config.search import make_search
from evomerge.errors import WorkerError
from evomerge.study.view import load_study
from evomerge.workers import make_pool
from evomerge.workers.job import Job, WorkerSettings
from tests.study.fakes import log_of
from tests.world import evomerge, kill_when, make_world, settings, start, status_of, write_config

pytestmark = pytest.mark.ray

RAY = {"pool": "ray", "address": "local", "count": 2, "cpus": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def inline_log(world):
    """The same search in one process: what every search on Ray must agree with."""
    import evomerge as api

    return log_of(api.search(settings(world, "inline")).ledger)


def worker_settings(world, **changes):
    config = make_search(settings(world))
    models = (config.models.base, *config.models.parents.values())
    values = {
        "models": models,
        "tokenizer": config.models.base,
        "out_dtype": "float32",
        "suite": config.suite,
        "cpus": 1,
        "device": "cpu",
    }
    return WorkerSettings(**{**values, **changes})


def num_stored(config):
    """Finished trials and scored chunks of a study that another process is running."""
    items = list((config.parent / "runs" / config.stem / "items").rglob("*.jsonl"))
    return sum(file.read_bytes().count(b"\n") for file in items)


def test_a_driver_killed_in_mid_search_is_resumed_without_loss_or_repeat(world, inline_log):
    config = write_config(world, "killed", workers=RAY)
    kill_when(start("search", config), lambda: num_stored(config) >= 17)
    before = log_of(load_study(config).ledger)
    finished = [entry for entry in before if entry[1] in ("done", "duplicate")]
    assert len(finished) >= 4
    assert len(finished) < 12, "the kill came in the middle"
    assert status_of(config)["state"] == "stopped"
    stored = num_stored(config)
    run = evomerge("resume", config)
    assert run.returncode == 0, run.stderr
    after = log_of(load_study(config).ledger)
    assert after[: len(finished)] == finished
    assert after == inline_log, "as if nothing had happened, and as in one process"
    assert status_of(config)["trials"]["done"] == 12
    # each chunk of each recipe once: 12 searched; base, parents, uniform and the 5 best confirmed
    assert num_stored(config) == 12 * 2 + 9 * 2
    assert stored < 12 * 2


def test_ctrl_c_stops_cleanly_and_prints_the_command_that_goes_on(world, inline_log):
    config = write_config(world, "stopped", workers=RAY)
    process = start("search", config)
    while num_stored(config) < 11:
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    assert f"Go on with: evomerge resume {config}" in stderr
    assert "Traceback" not in stderr
    assert status_of(config)["state"] == "interrupted"
    journal = config.parent / "runs" / "stopped" / "journal.log"
    run = evomerge("resume", "stopped", "--storage", journal)
    assert run.returncode == 0, run.stderr
    assert log_of(load_study(config).ledger) == inline_log


def test_workers_agree_and_a_killed_one_is_replaced(world, monkeypatch):
    config = make_search(settings(world, workers=RAY))
    pool = make_pool(config.workers, worker_settings(world))
    try:
        facts = pool.facts()
        recipe = next(iter(_baselines(world).values()))
        tasks = _tasks(world)
        chunk = tasks.chunks("search")[0]
        while len(pool.idle()) < 2:
            pool.collect(1.0)
        first, second = pool.idle()
        outcomes = _scored(pool, {w: Job(0, recipe, chunk) for w in (first, second)})
        assert [o.kind for o in outcomes] == ["done", "done"]
        assert outcomes[0].result == outcomes[1].result
        assert outcomes[0].digest == outcomes[1].digest
        assert {o.worker for o in outcomes} == {first, second}

        pool.submit(second, Job(8, recipe, chunk))
        with monkeypatch.context() as patch:
            patch.setattr(pool._ray, "get", _out_of_memory)
            (killed,) = _collect(pool, 1)
        assert (killed.kind, killed.job.trial) == ("lost", 8)
        while len(pool.idle()) < 2:
            pool.collect(1.0)
        first, second = pool.idle()
        for pid in _worker_pids():
            os.kill(pid, signal.SIGKILL)
        # a dead worker is found out when it is given work; the job comes back, the worker does not
        for worker in (first, second):
            pool.submit(worker, Job(7, recipe, chunk))
        lost = _collect(pool, 2)
        assert [(o.kind, o.job.trial) for o in lost] == [("lost", 7), ("lost", 7)]
        while not pool.idle():
            pool.collect(1.0)
        assert not set(pool.idle()) & {first, second}
        assert pool.facts() == facts
        (again,) = _scored(pool, {pool.idle()[0]: Job(7, recipe, chunk, attempt=2)})
        assert again.result == outcomes[0].result
    finally:
        pool.close()


def test_a_worker_that_cannot_be_prepared_says_why(world, tmp_path):
    from evomerge.config.models import ModelRef
    from evomerge.errors import CheckpointError

    config = make_search(settings(world, workers={**RAY, "count": 1}))
    missing = worker_settings(world, tokenizer=ModelRef(path=str(tmp_path)))
    pool = make_pool(config.workers, missing)
    try:
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            pool.facts()
    finally:
        pool.close()


def test_a_cluster_that_is_not_there_is_one_sentence(world):
    config = make_search(settings(world, workers={**RAY, "address": "127.0.0.1:1"}))
    with pytest.raises(
        WorkerError, match=r"workers\.address '127\.0\.0\.1:1': no Ray cluster answers"
    ):
        make_pool(config.workers, worker_settings(world))


def _scored(pool, jobs):
    for worker, job in jobs.items():
        pool.submit(worker, job)
    return sorted(_collect(pool, len(jobs)), key=lambda outcome: outcome.worker)


def _collect(pool, number):
    outcomes = []
    while len(outcomes) < number:
        outcomes += pool.collect(10.0)
    return outcomes


def _worker_pids():
    """Processes of the actors, oldest first."""
    pids = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/cmdline", "rb") as file:
                    command = file.read()
            except OSError:
                continue
            if command.startswith(b"ray::_Actor"):
                pids.append(int(folder))
    return sorted(pids)


def _tasks(world):
    from evomerge.evaluate.tasks import load_tasks

    return load_tasks(make_search(settings(world)).suite)


def _baselines(world):
    from evomerge.study.baselines import baseline_recipes
    from evomerge.study.setup import prepare

    return baseline_recipes(prepare(make_search(settings(world))))


def _out_of_memory(reference):
    from ray.exceptions import OutOfMemoryError

    raise OutOfMemoryError("the node was low on memory")
