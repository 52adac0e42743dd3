"""Racing in a study: what is stopped and told follows from the log and the items alone."""

import dataclasses
import random

import pytest

from evomerge.errors import StudyError
from evomerge.study.view import StudyView
from tests.study import fakes
from tests.study.fakes import FormulaPool, Killed, log_of, make_setup, run
from tests.study.test_driver import _with_budget, _with_choices

RACING = "racing: {mode: aggressive}\n"


def noisy_score(recipe, item):
    """Right or wrong, by the landscape and luck that is the recipe's and the item's own."""
    luck = random.Random(f"{recipe.hash}{item}").random()
    return float(luck < landscape(recipe, item))


landscape = fakes.score_of


@pytest.fixture(autouse=True)
def noise(monkeypatch):
    monkeypatch.setattr(fakes, "score_of", noisy_score)


def racing_setup(folder, **kwargs):
    return make_setup(folder, **{"evaluations": 24, "changes": RACING, **kwargs})


def stopped_of(ledger):
    return [record for record in ledger.candidates if record.state == "stopped"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "score_of", noisy_score)
        return log_of(run(racing_setup(tmp_path_factory.mktemp("reference")), FormulaPool()))


def test_some_are_stopped_after_one_chunk_and_some_later(reference):
    examples = [entry[6][3] for entry in reference if entry[1] == "stopped"]
    assert min(examples) == 10
    assert max(examples) > 10
    assert all(entry[6][3] == 40 for entry in reference if entry[1] == "done")


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (2, 5), (5, 1), (16, 2)])
def test_races_depend_neither_on_timing_nor_on_the_number_of_workers(
    tmp_path, reference, workers, seed
):
    """With 16 workers later chunks of a candidate come back before those that stop it."""
    pool = FormulaPool(num_workers=workers, seed=seed)
    assert log_of(run(racing_setup(tmp_path, workers=workers), pool)) == reference


@pytest.mark.parametrize("crash_after", [20, 23, 27, 31, 36, 44, 58, 70])
def test_a_killed_race_goes_on_as_if_nothing_had_happened(tmp_path, reference, crash_after):
    killed = FormulaPool(num_workers=3, crash_after=crash_after)
    with pytest.raises(Killed):
        run(racing_setup(tmp_path), killed)
    resumed = FormulaPool(num_workers=2, seed=9)
    assert log_of(run(racing_setup(tmp_path), resumed)) == reference
    assert not set(killed.jobs) & set(resumed.jobs), "no chunk that came back is scored again"


def scores(recipe, chunk):
    return [noisy_score(recipe, item) for item in range(10 * chunk, 10 * chunk + 10)]


def test_what_is_told_of_a_stopped_one_follows_from_its_generation(tmp_path):
    """Recomputed from the landscape: lead on what was seen, drawn to the generation's beyond."""
    ledger = run(racing_setup(tmp_path), FormulaPool(num_workers=3))
    assert stopped_of(ledger)
    for record in stopped_of(ledger):
        known = [
            r
            for r in ledger.records
            if r.state == "done"
            and not r.is_extra
            and (r.ask is None or r.result.tell_seq < record.ask.after)
        ]
        incumbent = max(known, key=lambda r: r.result.fitness)
        peers = [r for r in ledger.candidates if r.ask.after == record.ask.after]
        lead, variance = _lead(record, incumbent, record.result.examples // 10)
        first = [_lead(peer, incumbent, 1) for peer in peers if not peer.result.duplicate_of]
        mean = sum(value for value, _ in first) / len(first)
        noise = sum(own for _, own in first) / len(first)
        spread = sum((value - mean) ** 2 for value, _ in first) / (len(first) - 1)
        true = max(spread - noise, 0.0)
        beyond = mean + (lead - mean) * (true / (true + variance) if true else 0.0)
        share = record.result.examples / 40
        expected = incumbent.result.fitness + share * lead + (1 - share) * beyond
        assert -record.result.told_loss == pytest.approx(expected, abs=1e-12)
        assert record.result.fitness is None, "an estimate is told, and never shown as a score"


def _lead(record, incumbent, num_chunks):
    chunks = range(num_chunks)
    ours = [value for chunk in chunks for value in scores(record.recipe, chunk)]
    theirs = [value for chunk in chunks for value in scores(incumbent.recipe, chunk)]
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / len(gaps)
    return mean, sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps)


def test_a_stopped_merge_that_is_asked_for_again_is_scored_on_new_items_only(tmp_path):
    """Four merges in all, first with races, then without: each is brought to its end."""
    racing = _with_choices(racing_setup(tmp_path, evaluations=6))
    raced = run(racing, FormulaPool(num_workers=1))
    pool = FormulaPool(num_workers=1)
    ledger = run(_with_choices(make_setup(tmp_path, evaluations=40)), pool)
    went_on = 0
    for record in ledger.candidates[raced.num_asks :]:
        before = [r for r in ledger.stopped_before(record) if r.result.duplicate_of is None]
        if not before or record.result.duplicate_of is not None:
            continue
        jobs = [c for trial, role, c in pool.jobs if (trial, role) == (record.number, "search")]
        seen = sum(r.result.examples for r in before) // 10
        assert jobs == list(range(seen, 4))
        assert (record.state, record.result.examples) == ("done", 40 - 10 * seen)
        went_on += 1
    assert went_on


def test_a_space_in_which_all_is_stopped_is_exhausted(tmp_path):
    """A budget of items alone would never be spent: stopped again, a merge costs none."""
    setup = racing_setup(tmp_path, changes=RACING)
    setup = _with_budget(_with_choices(setup), {"examples": 10**6})
    ledger = run(setup, FormulaPool())
    assert StudyView(setup.config).summary["state"] == "exhausted"
    assert ledger.num_asks < 500


def test_within_a_generation_a_twin_of_a_stopped_one_is_told_the_same(tmp_path):
    ledger = run(_with_choices(racing_setup(tmp_path, evaluations=60)), FormulaPool())
    twins = [r for r in stopped_of(ledger) if r.result.duplicate_of is not None]
    assert twins
    for twin in twins:
        first = ledger[twin.result.duplicate_of]
        assert (twin.recipe, first.state) == (first.recipe, "stopped")
        assert twin.ask.after <= first.result.tell_seq
        assert twin.result.told_loss == first.result.told_loss
        assert twin.result.examples == 0


def test_a_chunk_that_fails_decides_only_where_the_ones_before_it_do_not(tmp_path):
    ledger = run(racing_setup(tmp_path / "a"), FormulaPool())
    victim = next(r for r in stopped_of(ledger) if r.result.examples == 10)
    for index, state in ((0, "failed"), (1, "stopped"), (3, "stopped")):

        def fault(job, index=index):
            at = (job.trial, job.chunk.role, job.chunk.index)
            return "failed" if at == (victim.number, "search", index) else None

        for workers in (1, 16):
            folder = tmp_path / f"{index}-{workers}"
            pool = FormulaPool(num_workers=workers, seed=3, fault=fault)
            assert run(racing_setup(folder), pool)[victim.number].state == state


def test_in_async_mode_the_log_replays(tmp_path):
    setup = racing_setup(tmp_path, mode="async", workers=3)
    with pytest.raises(Killed):
        run(setup, FormulaPool(num_workers=3, crash_after=45))
    ledger = run(setup, FormulaPool(num_workers=3, seed=1))
    assert sorted(r.result.tell_seq for r in ledger.candidates) == list(range(24))
    assert {r.state for r in ledger.candidates} == {"done", "stopped"}
    again = FormulaPool(num_workers=3)
    run(setup, again)  # replays the whole log; would raise if an ask differed
    assert again.jobs == []


def test_a_winner_is_never_one_that_was_stopped(tmp_path):
    setup = racing_setup(tmp_path)
    ledger = run(setup, FormulaPool())
    stopped = {record.number for record in stopped_of(ledger)}
    summary = StudyView(setup.config).summary
    assert summary["trials"]["stopped"] == len(stopped)
    assert not {scores["trial"] for scores in summary["confirm"].values()} & stopped


def test_off_is_a_search_without_races(tmp_path):
    """Also on resume: what was stopped stays so, and the rest is scored in full."""
    plain = run(make_setup(tmp_path / "plain", evaluations=8), FormulaPool())
    off = run(
        racing_setup(tmp_path / "off", evaluations=8, changes="racing: {mode: off}\n"),
        FormulaPool(),
    )
    assert log_of(plain) == log_of(off)
    raced = run(racing_setup(tmp_path / "raced", evaluations=12), FormulaPool())
    later = make_setup(tmp_path / "raced", evaluations=24)
    ledger = run(later, FormulaPool())
    assert log_of(ledger)[:17] == log_of(raced)[:17]
    assert all(r.state != "stopped" for r in ledger.candidates if r.ask.seq >= 12)


def test_lost_items_of_the_incumbent_are_one_sentence(tmp_path):
    setup = racing_setup(tmp_path, evaluations=8)
    run(setup, FormulaPool())
    for file in (tmp_path / "items" / "search").iterdir():
        file.unlink()
    larger = dataclasses.replace(setup, config=racing_setup(tmp_path, evaluations=16).config)
    with pytest.raises(
        StudyError, match=r"(?s)racing.mode: results per item of trial \d+, which.*"
    ):
        run(larger, FormulaPool())
