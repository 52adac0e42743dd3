"""Verdicts: the size, power and coverage of the one test; its terms; what voids it; its words."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.config.objective import ObjectiveConfig
from evomerge.errors import EvaluationError
from evomerge.evaluate.evaluator import TaskItems, TaskMetric
from evomerge.evaluate.paired import Term, compare, linearise, pseudo_values
from evomerge.evaluate.scores import ScoredTask, make_objective
from evomerge.evaluate.verdict import SIZE, Contender, Side, Verdict, choose, compare_rates, judge

ONE = (Term("maths", "acc", 1.0),)
Z = 1.959963984540054  # 97.5 % of a normal


def items(**columns):
    return {
        task: TaskItems(tuple(range(len(column))), {"acc": tuple(column)})
        for task, column in columns.items()
    }


def pair(num_items, won, lost):
    """Two models that differ on `won` items in favour of the first and on `lost` against it."""
    same = num_items - won - lost
    return items(maths=[1] * won + [0] * lost + [1] * same), items(
        maths=[0] * won + [1] * lost + [1] * same
    )


def binomial(total, count, chance):
    return math.comb(total, count) * chance**count * (1 - chance) ** (total - count)


def chance_of_a_claim(num_items, discordance, gain=0.0):
    """Exactly, by enumeration of all outcomes that are not rarer than 1e-7."""
    found = 0.0
    for differing in range(num_items + 1):
        outer = binomial(num_items, differing, discordance)
        if outer < 1e-7:
            continue
        # a lead is claimed from some number of wins on
        for won in range(differing, -1, -1):
            chance = outer * binomial(differing, won, 0.5 + gain / discordance / 2)
            if compare(ONE, *pair(num_items, won, differing - won)).z <= Z:
                break
            found += chance
    return found


class TestTheTest:
    def test_it_is_mcnemars_for_one_task_of_zeros_and_ones(self):
        # McNemar 1947: (b - c) / sqrt(b + c); ours is smaller by the n - 1 of the variance alone
        lead = compare(ONE, *pair(440, 57, 31))
        assert lead.value == pytest.approx(26 / 440, rel=1e-14)
        assert lead.z == pytest.approx(26 / math.sqrt(88), rel=1.2e-3)
        assert lead.z < 26 / math.sqrt(88)
        assert (lead.num_items, lead.num_differing) == (440, 88)
        assert lead.effective_items == pytest.approx(440, rel=1e-12)

    @pytest.mark.parametrize("num_items", [100, 200])
    @pytest.mark.parametrize("discordance", [0.02, 0.05, 0.1, 0.2, 0.4])
    def test_equal_models_are_told_apart_at_most_as_often_as_stated(self, num_items, discordance):
        # 0.0251 is the largest of all sizes that were enumerated, here and at 440 and 500 items
        assert 0.005 < chance_of_a_claim(num_items, discordance) < SIZE + 1.5e-4

    def test_six_points_are_found_with_a_power_of_four_fifths(self):
        assert chance_of_a_claim(440, 0.2, 0.06) == pytest.approx(0.81, abs=0.01)

    def test_size_and_coverage_with_several_tasks_of_unequal_weight(self):
        # the weighted sum is 0 though no task's difference is; 60, 40 and 150 items
        terms = (Term("a", "acc", 0.6), Term("b", "acc", 0.3), Term("c", "acc", 0.1))
        gains, sizes = {"a": 0.05, "b": -0.12, "c": 0.06}, {"a": 60, "b": 40, "c": 150}
        rng, claims, covered, runs = np.random.default_rng(0), 0, 0, 2000
        for _ in range(runs):
            winner, parent = {}, {}
            for task, size in sizes.items():
                chances = [(0.3 + gains[task]) / 2, (0.3 - gains[task]) / 2, 0.7]
                kinds = rng.choice(3, size, p=chances)
                winner[task], parent[task] = (kinds == 0).tolist(), (kinds == 1).tolist()
            lead = compare(terms, items(**winner), items(**parent))
            claims += lead.z > Z
            covered += abs(lead.value) <= lead.margin(Z)
        # 2000 runs know a rate of 2.5 % to 0.35 %, one of 95 % to 0.5 %; three of those
        assert claims / runs < SIZE + 3 * 0.0035
        assert claims / runs > SIZE - 3 * 0.0035
        assert covered / runs == pytest.approx(0.95, abs=0.015)

    @given(st.lists(st.sampled_from([-1, -0.5, 0, 0.25, 1]), min_size=8, max_size=60))
    def test_interval_and_test_agree(self, gaps):
        lead = compare(ONE, items(maths=gaps), items(maths=[0] * len(gaps)))
        claimed, above = lead.z > Z, lead.value - lead.margin(Z) > 0
        assert claimed == above or lead.z == pytest.approx(Z, rel=1e-9)

    @given(st.permutations(range(12)))
    def test_the_order_of_items_is_nothing_to_it(self, order):
        values, other = [1, 0, 1, 1, 0, 0.5, 1, 0, 0, 1, 1, 0.25], [0, 1, 1, 0.5] * 3
        moved = TaskItems(tuple(order), {"acc": tuple(values[i] for i in order)})
        assert compare(ONE, {"maths": moved}, items(maths=other)) == compare(
            ONE, items(maths=values), items(maths=other)
        )

    def test_swapping_the_models_turns_the_sign(self):
        one, other = pair(90, 20, 7)
        there, back = compare(ONE, one, other), compare(ONE, other, one)
        assert (there.value, there.z) == (-back.value, -back.z)

    def test_items_that_either_has_no_value_on_are_left_out(self):
        whole = compare(ONE, items(maths=[1, 0, 1]), items(maths=[0, 0, 1]))
        gaps = compare(ONE, items(maths=[1, 0, 1, None, 1]), items(maths=[0, 0, 1, 1, None]))
        assert gaps == whole

    def test_a_model_that_is_ahead_everywhere_is_surely_better(self):
        # 9 of 9: 3 errors, as a sign test's normal approximation says
        assert compare(ONE, *pair(9, 9, 0)).z == pytest.approx(3.0)
        assert compare(ONE, *pair(9, 0, 0)).z == 0.0

    def test_one_item_of_a_task_proves_nothing(self):
        terms = (*ONE, Term("reading", "acc", 1.0))
        lead = compare(
            terms, items(maths=[1] * 50, reading=[1]), items(maths=[0] * 50, reading=[0])
        )
        assert (lead.z, lead.margin(Z)) == (0.0, math.inf)

    def test_metrics_without_a_number_per_item_are_refused(self):
        pairs = items(maths=[[1, 0], [1, 1]])
        with pytest.raises(EvaluationError, match="task 'maths': acc gives list per item"):
            compare(ONE, pairs, pairs)


class TestTerms:
    TASKS = (
        ScoredTask("maths", "acc", weight=3.0, floor=0.2),
        ScoredTask("reading", "f1", weight=1.0),
        ScoredTask("watched", "acc", weight=0.0),
    )

    def terms(self, values=(0.4, 0.8), **config):
        objective = make_objective(ObjectiveConfig(**config), self.TASKS)
        return objective, linearise(objective, self.metrics(*values))

    def metrics(self, maths, reading):
        return {
            "maths": {"acc": TaskMetric(maths, 0.1, 10)},
            "reading": {"f1": TaskMetric(reading, 0.1, 10)},
        }

    def test_of_a_weighted_mean(self):
        _, (maths, reading) = self.terms()
        assert (maths.task, maths.metric, maths.coefficient) == ("maths", "acc", 0.75)
        assert (reading.task, reading.metric, reading.coefficient) == ("reading", "f1", 0.25)

    def test_of_scores_above_a_floor(self):
        _, (maths, reading) = self.terms(scores="floor_normalised")
        assert maths.coefficient == pytest.approx(0.75 / 0.8, rel=1e-14)
        assert reading.coefficient == 0.25

    def test_of_scores_beside_the_best_parent(self):
        objective = make_objective(ObjectiveConfig(scores="parent_relative"), self.TASKS)
        objective = objective.with_parents([self.metrics(0.5, 0.25), self.metrics(0.1, 0.2)])
        maths, reading = linearise(objective, self.metrics(0.4, 0.8))
        assert (maths.coefficient, reading.coefficient) == pytest.approx((1.5, 1.0))

    def test_of_the_worst_task(self):
        _, terms = self.terms(kind="worst_task")
        assert terms == (Term("maths", "acc", 1.0),)

    def test_of_a_metric_where_lower_is_better(self):
        text = ScoredTask("text", "bits", higher_is_better=False)
        objective = make_objective(ObjectiveConfig(), [text])
        (term,) = linearise(objective, {"text": {"bits": TaskMetric(1.5, None, 9)}})
        assert term.coefficient == -1.0

    def test_a_geometric_mean_of_nothing_has_none(self):
        _, terms = self.terms((0.0, 0.5), kind="geometric_mean")
        assert terms == ()

    @pytest.mark.parametrize("kind", ["worst_task", "geometric_mean"])
    @pytest.mark.parametrize("scores", ["raw", "floor_normalised"])
    def test_a_lead_in_the_terms_is_a_lead_in_the_objective(self, kind, scores):
        # concave: at the winner the terms say less than there is, at the incumbent more
        rng = np.random.default_rng(3)
        for winner, parent in rng.uniform(0.25, 1.0, (200, 2, 2)):
            objective, at_winner = self.terms(winner, kind=kind, scores=scores)
            _, at_parent = self.terms(parent, kind=kind, scores=scores)
            true = objective(self.metrics(*winner)).value - objective(self.metrics(*parent)).value
            assert self.lead_in(at_winner, winner, parent) <= true + 1e-12
            assert self.lead_in(at_parent, winner, parent) >= true - 1e-12

    def lead_in(self, terms, winner, parent):
        means = dict(zip(("maths", "reading"), zip(winner, parent, strict=True), strict=True))
        return sum(t.coefficient * (means[t.task][0] - means[t.task][1]) for t in terms)

    def test_a_metric_that_was_not_measured_is_refused(self):
        objective = make_objective(ObjectiveConfig(), self.TASKS)
        with pytest.raises(EvaluationError, match="task 'reading': no f1 was measured"):
            linearise(objective, {"maths": {"acc": TaskMetric(0.5, None, 9)}})


class TestPseudoValues:
    def test_of_a_mean_they_are_the_values(self):
        values = [0.25, 1.0, 0.0, 0.5, 0.5]
        assert pseudo_values(values, np.mean) == pytest.approx(values, abs=1e-12)

    def test_their_error_is_that_of_f1(self):
        # the spread of F1 over 3000 draws of 200 items, against the error from a single draw
        def f1(pairs):
            kinds = Counter(pairs)
            return 2 * kinds[1, 1] / (2 * kinds[1, 1] + kinds[0, 1] + kinds[1, 0])

        rng = np.random.default_rng(5)
        draws = rng.choice(4, (3000, 200), p=[0.3, 0.1, 0.2, 0.4])
        every = [[divmod(int(kind), 2) for kind in draw] for draw in draws]
        errors = [
            float(np.std(pseudo_values(pairs, f1), ddof=1)) / math.sqrt(200) for pairs in every[:20]
        ]
        # the spread is known to 1.3 %, the mean of 20 errors to about 2 %
        assert np.mean(errors) == pytest.approx(np.std([f1(pairs) for pairs in every]), rel=0.08)


class TestChoice:
    def test_the_best_merge_and_the_best_parent(self):
        found = choose(
            [
                Contender("parent math", 0.6, False),
                Contender("parent code", 0.7, False),
                Contender("uniform", 0.5, True),
                Contender("trial 7", 0.65, True),
            ]
        )
        assert [one.name for one in found] == ["trial 7", "parent code"]

    def test_of_equals_the_first(self):
        equals = [Contender(name, 0.5, name > "b") for name in "abcd"]
        assert [one.name for one in choose(equals)] == ["c", "a"]


class TestRates:
    def test_against_the_binomial(self):
        # 9 to 1 of 10 that differ: 2 (1 + 10) / 1024
        winner, parent = [1] * 9 + [0] * 91, [0] * 9 + [1] + [0] * 90
        (rate,) = compare_rates({"empty": (winner, parent)})
        assert (rate.winner, rate.parent, rate.num_items) == (9, 1, 100)
        assert rate.p_value == pytest.approx(22 / 1024, rel=1e-14)
        assert rate.differs

    def test_more_kinds_of_flags_ask_for_more(self):
        flags = ([1] * 9 + [0] * 91, [0] * 9 + [1] + [0] * 90)
        alike = ([0] * 100, [0] * 100)
        rates = compare_rates({"empty": flags, "truncated": alike, "unreadable": alike})
        assert not any(rate.differs for rate in rates)
        assert rates[1].p_value == 1.0

    def test_either_model_may_be_the_worse(self):
        (rate,) = compare_rates({"empty": ([0] * 8, [1] * 8)})
        assert rate.differs


def verdict(won, lost, num_items=440, truncated=(0, 0)):
    winner, parent = pair(num_items, won, lost)
    mean = {}
    for name, result in (("winner", winner), ("parent", parent)):
        mean[name] = sum(result["maths"].values["acc"]) / num_items
    flags = [[True] * n + [False] * (num_items - n) for n in truncated]
    return judge(
        ONE,
        Side("trial 41", 0.71, mean["winner"], winner, {"truncated": flags[0]}),
        Side("parent math", 0.6, mean["parent"], parent, {"truncated": flags[1]}),
    )


class TestVerdict:
    def test_better(self):
        found = verdict(60, 30)
        # by hand: mean 30/440; s^2 = (90 - 900/440) / 439; margin z s / sqrt(n - z^2)
        margin = Z * math.sqrt((90 - 900 / 440) / 439) / math.sqrt(440 - Z**2)
        assert found.effect == pytest.approx(30 / 440, rel=1e-12)
        assert (found.low, found.high) == pytest.approx(
            (30 / 440 - margin, 30 / 440 + margin), rel=1e-9
        )
        assert found.outcome == "better"
        assert found.p_value == pytest.approx(7.8e-4, rel=0.02)  # 1 - Phi(30 / sqrt(90))
        assert found.sentence == (
            "trial 41 is better than parent math by 6.8 points (95 % interval 2.6 to 11.0, "
            "440 items)"
        )

    def test_no_evidence(self):
        found = verdict(45, 40)
        assert found.outcome == "no_evidence"
        assert found.sentence == (
            "no evidence that any merge is better than parent math: difference 1.1 points, 95 % "
            "interval -3.0 to 5.3, 440 items; a true gain of 5.9 points would have been found four "
            "times in five"
        )

    def test_no_point_is_minus_nothing(self):
        assert "difference 0.0 points" in verdict(2000, 2001, 10_000).sentence

    def test_what_could_have_been_found_is_found_as_often_as_said(self):
        # a little more often: a gain makes the differences less spread than they are without one
        found = verdict(44, 44)
        assert chance_of_a_claim(440, 0.2, found.detectable) == pytest.approx(0.805, abs=0.01)

    def test_optimism_of_both(self):
        found = verdict(60, 30)
        assert found.optimism == pytest.approx(0.71 - 410 / 440)
        assert found.parent_optimism == pytest.approx(0.6 - 380 / 440)

    def test_other_rates_void_it(self):
        found = verdict(60, 30, truncated=(2, 25))
        assert found.outcome == "void"
        assert found.sentence == (
            "no verdict on trial 41: 0.5 % of its answers are truncated, 5.7 % of those of parent "
            "math. The difference 6.8 points, 95 % interval 2.6 to 11.0, 440 items may come from "
            "that: mend it and confirm on fresh items"
        )
        assert verdict(60, 30, truncated=(22, 25)).outcome == "better"

    def test_answers_without_a_value_void_it(self):
        winner, parent = pair(440, 60, 30)
        values = winner["maths"].values["acc"]
        holes = items(maths=[*values[:400], *[None] * 40])
        found = judge(ONE, Side("trial 41", 0, 0, holes), Side("parent math", 0, 0, parent))
        assert (found.outcome, found.num_items) == ("void", 400)
        assert "9.1 % of its answers are without a value" in found.sentence

    def test_plain_data_and_back(self):
        found = verdict(60, 30, truncated=(2, 25))
        assert Verdict.from_json(json.loads(json.dumps(found.to_json()))) == found

    def test_too_few_items_are_refused(self):
        few = items(maths=[1, 0, 1])
        with pytest.raises(EvaluationError, match="3 report items have a value for both trial 4 "):
            judge(ONE, Side("trial 4", 0, 0, few), Side("base", 0, 0, few))

    def test_an_objective_that_nothing_moves_is_refused(self):
        side = Side("trial 4", 0, 0, items(maths=[1] * 9))
        with pytest.raises(EvaluationError, match="geometric mean of trial 4 is 0"):
            judge((), side, side)
