"""The loop: what is asked, recorded and told is a function of the log.

It is so whatever workers, timing and faults do.
"""

import pytest

from evomerge.errors import InterruptedStudy, StudyError
from evomerge.study.storage import StudyStorage, open_storage
from evomerge.study.view import StudyView
from tests.study.fakes import FormulaPool, Killed, log_of, make_setup, run

NO_MEAN = "confirm: {mean: false}\n"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The log of an undisturbed search."""
    setup = make_setup(tmp_path_factory.mktemp("reference"))
    return log_of(run(setup, FormulaPool()))


def test_budget_baselines_and_order(tmp_path):
    ledger = run(make_setup(tmp_path), FormulaPool())
    names = [record.baseline for record in ledger.records[:5]]
    assert names == ["base", "parent:a", "parent:b", "uniform", "greedy_soup"]
    assert ledger.num_evaluations == 12
    # the soup of these two is the better one alone
    assert {r.baseline for r in ledger.records if r.state != "done"} == {"greedy_soup"}
    assert [r.ask.seq for r in ledger.candidates] == list(range(12))
    assert [r.result.tell_seq for r in ledger.candidates] == list(range(12))
    assert [r.ask.after for r in ledger.candidates] == [0] * 4 + [4] * 4 + [8] * 4
    best = ledger.best.result.fitness
    assert best == max(r.result.fitness for r in ledger.candidates)
    assert best > max(r.result.fitness for r in ledger.baselines.values())


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (2, 5), (5, 1), (16, 2)])
def test_sync_mode_depends_neither_on_timing_nor_on_the_number_of_workers(
    tmp_path, reference, workers, seed
):
    pool = FormulaPool(num_workers=workers, seed=seed)
    assert log_of(run(make_setup(tmp_path, workers=workers), pool)) == reference


@pytest.mark.parametrize("crash_after", [0, 3, 17, 18, 33, 40, 63, 66, 68])
def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path, reference, crash_after):
    setup = make_setup(tmp_path)
    killed = FormulaPool(crash_after=crash_after)
    with pytest.raises(Killed):
        run(setup, killed)
    before = log_of(StudyView(setup.config).ledger) if crash_after else []
    resumed = FormulaPool(seed=9)
    ledger = run(setup, resumed)
    assert log_of(ledger) == reference
    finished = [entry for entry in before if entry[1] in ("done", "duplicate")]
    assert finished == reference[: len(finished)], "finished trials stand unchanged"
    assert not set(killed.jobs) & set(resumed.jobs), "no chunk that came back is scored again"


@pytest.fixture
def crashing_storage(monkeypatch):
    """Kill the process just before or after the n-th call of a storage method."""

    def arrange(method, call, after):
        original = getattr(StudyStorage, method)
        calls = [0]

        def crashing(self, *args, **kwargs):
            calls[0] += 1
            if calls[0] == call and not after:
                raise Killed
            answer = original(self, *args, **kwargs)
            if calls[0] == call:
                raise Killed
            return answer

        monkeypatch.setattr(StudyStorage, method, crashing)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("add_baseline", 2),
        ("add_candidate", 1),
        ("add_candidate", 6),
        ("start", 7),
        ("finish", 3),
        ("finish", 7),
        ("close_recorded", 9),
    ],
)
def test_a_kill_between_any_two_writes_loses_and_doubles_nothing(
    tmp_path, reference, crashing_storage, monkeypatch, method, call, after
):
    setup = make_setup(tmp_path)
    crashing_storage(method, call, after)
    with pytest.raises(Killed):
        run(setup, FormulaPool())
    monkeypatch.undo()
    assert log_of(run(setup, FormulaPool(seed=4))) == reference


def test_interruption_leaves_a_study_that_goes_on(tmp_path, reference):
    setup = make_setup(tmp_path)
    pool = FormulaPool()
    with pytest.raises(InterruptedStudy):
        run(setup, pool, interrupted=lambda: len(pool.jobs) > 25)
    assert open_storage(setup.config.study, create=False).attribute("state") == "interrupted"
    assert log_of(run(setup, FormulaPool())) == reference


def test_a_larger_budget_continues_like_one_search(tmp_path, reference):
    small = make_setup(tmp_path, evaluations=6, changes=NO_MEAN)
    run(small, FormulaPool())
    large = make_setup(tmp_path, evaluations=12, changes=NO_MEAN)
    assert log_of(run(large, FormulaPool())) == [
        # the cut generation was told before its rest was asked; everything else is the same
        (*entry[:5], entry[5] and type(entry[5])(entry[5].seq, after, entry[5].genome), entry[6])
        for entry, after in zip(
            reference[:-1], [None] * 5 + [0] * 4 + [4] * 2 + [6] * 2 + [8] * 4, strict=True
        )
    ]


def test_a_search_that_is_over_does_nothing_more(tmp_path, reference):
    setup = make_setup(tmp_path)
    run(setup, FormulaPool())
    again = FormulaPool()
    assert log_of(run(setup, again)) == reference
    assert again.jobs == []


def test_async_mode_keeps_every_invariant_and_its_log_replays(tmp_path):
    setup = make_setup(tmp_path, evaluations=20, mode="async", workers=3)
    with pytest.raises(Killed):
        run(setup, FormulaPool(num_workers=3, crash_after=45))
    ledger = run(setup, FormulaPool(num_workers=3, seed=1))
    assert [r.ask.seq for r in ledger.candidates] == list(range(20))
    assert sorted(r.result.tell_seq for r in ledger.candidates) == list(range(20))
    assert all(r.state == "done" for r in ledger.candidates)
    afters = [r.ask.after for r in ledger.candidates]
    assert afters == sorted(afters)
    again = FormulaPool(num_workers=3)
    run(setup, again)  # replays the whole log; would raise if an ask differed
    assert again.jobs == []


def test_failed_candidates_are_told_as_the_worst_loss_and_the_search_goes_on(tmp_path):
    def fault(job):
        return {6: "failed", 9: "invalid"}.get(job.trial)

    ledger = run(make_setup(tmp_path), FormulaPool(fault=fault))
    failed, invalid = ledger[6], ledger[9]
    assert (failed.state, failed.result.error) == ("failed", "injected failed")
    assert (invalid.state, invalid.result.fitness) == ("invalid", None)
    for record in (failed, invalid):
        earlier = [r for r in ledger.records if r.number < record.number and r.state == "done"]
        assert record.result.told_loss == max(-r.result.fitness for r in earlier)
    assert ledger.num_evaluations == 12
    assert sum(r.state == "done" for r in ledger.candidates) == 10


def test_a_lost_worker_changes_nothing_but_the_attempts(tmp_path, reference):
    lost = [2, 7, 7, 8]  # trials whose next job loses its worker

    def fault(job):
        if job.trial not in lost:
            return None
        lost.remove(job.trial)
        return "lost"

    ledger = run(make_setup(tmp_path), FormulaPool(fault=fault))
    assert log_of(ledger) == reference
    assert ledger[7].result.attempt == 3


def test_a_candidate_that_kills_its_workers_is_given_up(tmp_path):
    ledger = run(
        make_setup(tmp_path), FormulaPool(fault=lambda job: "lost" if job.trial == 5 else None)
    )
    assert ledger[5].state == "failed"
    assert ledger[5].result.error == "lost 3 times (last: injected lost)"
    assert ledger.num_evaluations == 12


def test_a_baseline_that_fails_stops_the_search_with_its_reason(tmp_path):
    pool = FormulaPool(fault=lambda job: "failed" if job.trial == 1 else None)
    with pytest.raises(StudyError, match=r"baseline parent:a cannot be scored \(injected failed\)"):
        run(make_setup(tmp_path), pool)


def test_the_same_recipe_is_scored_once_and_an_exhausted_space_ends_the_search(tmp_path):
    setup = make_setup(tmp_path, evaluations=500)
    small = _with_choices(setup)
    pool = FormulaPool()
    ledger = run(small, pool)
    done = [r for r in ledger.candidates if r.state == "done"]
    twins = [r for r in ledger.candidates if r.state == "duplicate"]
    assert len(done) <= 4
    assert len({r.recipe.hash for r in done}) == len(done)
    for twin in twins:
        original = ledger[twin.result.duplicate_of]
        assert twin.recipe.hash == original.recipe.hash
        assert twin.result.fitness == original.result.fitness
        assert twin.result.examples == 0
    # four search chunks and one confirm chunk of each merge; the mean is one of them
    assert len(pool.jobs) == 5 * (4 + len(done))
    assert ledger.duplicates_in_a_row() >= 40
    assert StudyView(small.config).summary["state"] == "exhausted"


def _with_choices(setup):
    from dataclasses import replace

    from evomerge.config.search import make_search
    from evomerge.space.space import build_space
    from tests.study.fakes import WEIGHT

    data = setup.config.model_dump(mode="json", by_alias=True, exclude_none=True)
    data["space"] = {"weight": {"choices": [0.0, 0.5]}}
    config = make_search(data)
    names = ["model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w"]
    space = build_space(config.space, {}, (WEIGHT,), ["a", "b"], setup.layout, names)
    return replace(setup, config=config, space=space)


def test_budgets_in_examples_and_seconds(tmp_path):
    setup = make_setup(tmp_path / "a")
    by_examples = _with_budget(setup, {"examples": 40 * 4 + 1})
    assert run(by_examples, FormulaPool()).num_asks == 8, (
        "the generation that crosses the line is finished"
    )
    ticks = iter(range(100000))
    by_seconds = _with_budget(make_setup(tmp_path / "b"), {"seconds": 60.0})
    ledger = run(by_seconds, FormulaPool(), clock=lambda: float(next(ticks)))
    assert ledger.num_asks % 4 == 0
    assert 50.0 <= ledger.elapsed_s <= 60.0 + 4 * 4 + 1, (
        "it ends with the generation that crosses the line"
    )


def _with_budget(setup, budget):
    from dataclasses import replace

    from evomerge.config.search import BudgetConfig

    study = setup.config.study.model_copy(update={"budget": BudgetConfig(**budget)})
    return replace(setup, config=setup.config.model_copy(update={"study": study}))


def test_confirm_scores_winner_and_baselines_on_unseen_items(tmp_path):
    setup = make_setup(tmp_path)
    pool = FormulaPool()
    ledger = run(setup, pool)
    confirm = StudyView(setup.config).summary["confirm"]
    best = [f"trial {record.number}" for record in ledger.ranked()[:5]]
    baselines = ["base", "parent:a", "parent:b", "uniform", "greedy_soup"]
    assert list(confirm) == ["winner", *baselines, "mean", *best]
    assert {**confirm["greedy_soup"], "trial": 1} == confirm["parent:a"]
    # every item adds the same to all of these formulas
    assert confirm["winner"] == {"name": best[0], **confirm[best[0]]}
    assert confirm["winner"]["num_items"] == 10
    # of parent a and the soup, which are one merge, the first is scored for both
    assert sum(role == "confirm" for _, role, _ in pool.jobs) == len(confirm) - 2
