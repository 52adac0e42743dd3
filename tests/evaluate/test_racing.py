"""Races: how often the wrong candidate is stopped, and how true what it is told as is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.evaluate.evaluator import TaskItems, join_results
from evomerge.evaluate.paired import Term, compare
from evomerge.evaluate.racing import RISK, Race, check_racing
from evomerge.evaluate.scores import ScoredTask

CHUNKS, CHUNK = 6, 30
SIZE = CHUNKS * CHUNK
ONE = (Term("maths", "acc", 1.0),)
TWO = (Term("maths", "acc", 0.7), Term("reading", "acc", 0.3))


def results(values, first=0):
    """Items numbered from `first` on."""
    ids = tuple(range(first, first + len(values)))
    return {"maths": TaskItems(ids, {"acc": tuple(values)})}


def race(incumbent, mode="conservative"):
    return Race(mode, CHUNKS, ONE, results(incumbent), sum(incumbent) / len(incumbent))


def items_until_stopped(run, values):
    """How many items a candidate is scored on."""
    for seen in range(CHUNK, len(values) + 1, CHUNK):
        if run.stops(results(values[:seen])):
            return seen
    return len(values)


def draw(rng, lead, discordance=0.25):
    """Incumbent and a candidate that is ahead by `lead` on all items there are."""
    chances = [(discordance + lead) / 2, (discordance - lead) / 2, 1 - discordance]
    kinds = rng.choice(3, SIZE, p=chances)
    return (kinds != 0).astype(int).tolist(), (kinds != 1).astype(int).tolist()


def share_stopped(mode, pairs):
    stopped = [items_until_stopped(race(inc, mode), values) < SIZE for inc, values in pairs]
    return np.mean(stopped)


class TestStopping:
    # 1000 races know a rate of 5 % to 0.7 %, one of 25 % to 1.4 %; they were 1 to 3 and 11 to 12 %
    RUNS = 1000

    @pytest.mark.parametrize("mode", ["conservative", "aggressive"])
    @pytest.mark.parametrize("discordance", [0.06, 0.3])
    def test_an_equal_candidate_is_stopped_at_most_as_often_as_stated(self, mode, discordance):
        rng = np.random.default_rng(1)
        share = share_stopped(mode, [draw(rng, 0.0, discordance) for _ in range(self.RUNS)])
        assert 0.1 * RISK[mode] < share <= RISK[mode]

    def test_a_better_one_more_rarely_and_a_worse_one_mostly(self):
        rng = np.random.default_rng(2)
        pairs = {lead: [draw(rng, lead) for _ in range(500)] for lead in (0.05, -0.15)}
        assert share_stopped("conservative", pairs[0.05]) < 0.01
        assert share_stopped("conservative", pairs[-0.15]) > 0.8
        # and soon: with half of the items on average
        seen = [items_until_stopped(race(i, "aggressive"), v) for i, v in pairs[-0.15]]
        assert np.mean(seen) < SIZE / 2

    @pytest.mark.parametrize("mode", ["conservative", "aggressive"])
    def test_against_an_incumbent_that_was_lucky_on_these_very_items(self, mode):
        # whatever the answers are: if the candidate would draw level on all items, then over all
        # ways to deal them out it is stopped at most as often as stated
        rng = np.random.default_rng(3)
        incumbent = np.array([1] * 30 + [0] * 30 + [1] * (SIZE - 60))
        values = np.array([0] * 30 + [1] * 30 + [1] * (SIZE - 60))
        pairs = []
        for _ in range(self.RUNS):
            order = rng.permutation(SIZE)
            pairs.append((incumbent[order].tolist(), values[order].tolist()))
        assert share_stopped(mode, pairs) <= RISK[mode]

    def test_never_when_off_or_when_nothing_is_left_to_save(self):
        worst, best = [0] * SIZE, [1] * SIZE
        assert not race(best, "off").stops(results(worst[:CHUNK]))
        assert race(best).stops(results(worst[:CHUNK]))
        assert not race(best).stops(results(worst))

    def test_never_where_nothing_moves_the_objective(self):
        run = Race("aggressive", CHUNKS, (), results([1] * SIZE), 0.0)
        assert not run.stops(results([0] * CHUNK))

    def test_the_order_in_which_chunks_came_back_is_nothing_to_it(self):
        rng = np.random.default_rng(4)
        incumbent, values = draw(rng, -0.1)
        parts = [results(values[k : k + CHUNK], k) for k in range(0, 4 * CHUNK, CHUNK)]
        run = race(incumbent)
        there, back = join_results(parts), join_results(parts[::-1])
        assert run.stops(there) == run.stops(back) == run.stops(results(values[: 4 * CHUNK]))
        assert run.told(there, parts[:1]) == run.told(back, parts[:1])


class TestTold:
    def test_by_hand(self):
        # leads on the first 30 items: -0.3, -0.1, 0.1; so their mean is -0.1, spread 0.04; each
        # has a noise of (0.3 - 0.09) * 30/29 / 30, (0.1 - 0.01) ..., (0.1 - 0.01) ...
        incumbent = [1] * 15 + [0] * (SIZE - 15)
        firsts = [
            results([0] * 9 + [1] * 6 + [0] * 15),
            results([0] * 3 + [1] * 12 + [0] * 15),
            results([1] * 15 + [1] * 3 + [0] * 12),
        ]
        noise = (0.21 + 0.09 + 0.09) / 29 / 3
        own = 0.21 / 29
        lasting = -0.1 - 0.2 * (0.04 - noise) / (0.04 - noise + own)
        expected = 15 / SIZE + (1 / 6) * -0.3 + (5 / 6) * lasting
        assert race(incumbent).told(firsts[0], firsts) == pytest.approx(expected, rel=1e-12)

    def test_where_candidates_are_alike_all_leads_are_luck(self):
        # three leads that differ by less than their noise
        incumbent = [1] * 15 + [0] * (SIZE - 15)
        firsts = [results([0] * n + [1] * (15 - n) + [0] * 15) for n in (5, 6, 7)]
        expected = 15 / SIZE + (1 / 6) * -7 / 30 + (5 / 6) * -6 / 30
        assert race(incumbent).told(firsts[2], firsts) == pytest.approx(expected, rel=1e-12)

    def test_alone_in_its_generation_it_is_told_its_lead(self):
        incumbent = [1] * 15 + [0] * (SIZE - 15)
        first = results([0] * 9 + [1] * 6 + [0] * 15)
        assert race(incumbent).told(first, [first]) == pytest.approx(15 / SIZE - 0.3, rel=1e-12)

    @given(st.permutations(range(5)))
    def test_the_order_of_the_others_is_nothing_to_it(self, order):
        rng = np.random.default_rng(5)
        pairs = [draw(rng, -0.1) for _ in range(5)]
        firsts = [results(values[:CHUNK]) for _, values in pairs]
        run, seen = race(pairs[0][0]), results(pairs[0][1][: 2 * CHUNK])
        assert run.told(seen, [firsts[i] for i in order]) == run.told(seen, firsts)

    @pytest.mark.parametrize("mode", ["conservative", "aggressive"])
    def test_it_is_true_on_average_though_the_unlucky_are_stopped(self, mode):
        rng = np.random.default_rng(6)
        told, plain = [], []
        for _ in range(250):
            incumbent = (rng.random(SIZE) < 0.6).astype(int)
            every = []
            for lead in rng.normal(-0.08, 0.07, 8):
                # a quarter of the answers is drawn anew, at a rate that makes the lead
                anew = rng.random(SIZE) < 0.4
                right = rng.random(SIZE) < np.clip(0.6 + lead / 0.4, 0, 1)
                every.append(np.where(anew, right, incumbent).astype(int).tolist())
            run = race(incumbent.tolist(), mode)
            firsts = [results(values[:CHUNK]) for values in every]
            for values in every:
                seen = items_until_stopped(run, values)
                if seen < SIZE:
                    part, full = results(values[:seen]), sum(values) / SIZE
                    told.append(run.told(part, firsts) - full)
                    lead = compare(ONE, part, run.incumbent).value
                    plain.append(run.score + lead - full)
        assert len(told) > 1000
        # errors of 5 points: the mean of a thousand is known to 0.15 points, three of those
        assert abs(np.mean(told)) < 0.0045
        # what would have been told without a thought of selection; it was 3 points too low
        assert np.mean(plain) < -0.02


class TestTasksOfUnequalWeight:
    def test_leads_count_by_weight(self):
        # on each 4 items one less of maths, one more of reading
        same = {"acc": (0, 0, 1, 1) * 10}
        ahead, behind = {"acc": (0, 1, 1, 1) * 10}, {"acc": (0, 0, 0, 1) * 10}
        ids = tuple(range(40))
        incumbent = {"maths": TaskItems(ids, same), "reading": TaskItems(ids, same)}
        candidate = {"maths": TaskItems(ids, behind), "reading": TaskItems(ids, ahead)}
        run = Race("aggressive", 4, TWO, incumbent, 0.5)
        part = {
            task: TaskItems(items.ids[:8], {"acc": items.values["acc"][:8]})
            for task, items in candidate.items()
        }
        assert run.told(part, [part]) == pytest.approx(0.5 + 0.25 * (0.3 - 0.7), rel=1e-12)


class TestRefusals:
    TASKS = (ScoredTask("maths", "acc,none"), ScoredTask("names", "f1,none"))

    def test_metrics_that_are_no_means(self):
        with pytest.raises(
            ConfigError, match=r"racing\.mode: task 'names' is scored by f1,none, which"
        ):
            check_racing("aggressive", 4, self.TASKS, {"maths"})

    def test_a_single_chunk(self):
        with pytest.raises(ConfigError, match=r"racing.mode: .* 1 chunk.*Raise suite\.chunks"):
            check_racing("conservative", 1, self.TASKS, {"maths", "names"})

    def test_nothing_when_off(self):
        check_racing("off", 1, self.TASKS, ())
