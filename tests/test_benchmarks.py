"""Benchmarks on tiny sizes: what they print is whole and adds up. Nothing here looks at a clock."""

import json
import math

import pytest
import torch

from benchmarks import equality, materialise, measure, merge_disk
from evomerge.kernels import dispatch, reference
from evomerge.kernels.dispatch import Kernels
from evomerge.methods import METHODS

KEYS = {"case", "method", "n", "k", "x_copy", "x_mergekit", "device", "commit"}


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


class Clock:
    """Says that each run took the next of the given seconds."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def __call__(self, run):
        run()
        return self.seconds.pop(0)


class TestMeasure:
    def test_rounds_are_interleaved_and_begin_with_another_each_time(self):
        ran = []
        runs = {name: (lambda name=name: ran.append(name)) for name in "abc"}
        found = measure.interleaved(runs, 4, Clock(*range(12)))
        assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "abc"
        assert found.seconds == {"a": [0, 5, 7, 9], "b": [1, 3, 8, 10], "c": [2, 4, 6, 11]}

    def test_ratios_are_taken_within_rounds(self):
        rounds = measure.Rounds({"ours": [2.0, 30.0, 4.0], "copy": [1.0, 10.0, 4.0]})
        assert rounds.ratio("ours", "copy") == measure.Ratio(2.0, 1.0, 3.0)
        assert rounds.ratio("ours", "copy", 2.0) == measure.Ratio(1.0, 0.5, 1.5)
        assert rounds.median_s("ours") == 4.0

    @pytest.mark.parametrize(
        ("text", "number"),
        [("64Mi", 2**26), ("1.5Ki", 1536), ("0.27B", 270_000_000), ("291", 291), ("2K", 2000)],
    )
    def test_sizes(self, text, number):
        assert measure.size(text) == number

    @pytest.mark.parametrize("text", ["", "Mi", "-3", "0", "64MB", "nan", "inf"])
    def test_what_is_no_size_is_refused(self, text):
        with pytest.raises(measure.argparse.ArgumentTypeError, match="not a size"):
            measure.size(text)

    def test_copies_move_the_bytes(self):
        target = measure.copy_of(1000)()
        assert target.numel() == 500
        assert bool((target == 1).all())

    def test_no_commit_without_git(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert measure.commit.__wrapped__() is None

    def test_tables_leave_out_empty_columns(self, capsys):
        ratio = measure.Ratio(1.5, 1.25, 2.0)
        rows = [
            measure.Row("cached", "ties", 3, 1, ratio, more={"ns": 0.51234, "gap": None}),
            measure.Row("cold", "ties", 3, 1, more={"params": 12345678}),
        ]
        measure.show(rows, False)
        assert capsys.readouterr().out.splitlines() == [
            "| case | method | n | k | x copy | ns | params |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            "| cached | ties | 3 | 1 | 1.50 (1.25 to 2.00) | 0.512 |  |",
            "| cold | ties | 3 | 1 |  |  | 12345678 |",
        ]


class TestMaterialise:
    def test_json_has_every_key_and_adds_up(self, capsys):
        words = ["--method", "all", "--params", "12Ki", "--rounds", "1", "--json", "--cold-stats"]
        materialise.main([*words, "-k", "2"])
        rows = printed(capsys)
        assert {row["method"] for row in rows} == set(METHODS) - set(materialise.NOT_SEARCHED)
        for row in rows:
            assert row.keys() >= KEYS
            low, high = row["x_copy_spread"]
            assert 0 < low <= row["x_copy"] <= high
            assert row["x_mergekit"] is None
            assert row["params"] == 12 * 1024
            assert row["k"] == 2
            assert row["ns_per_param"] > 0
            assert row["x_k1"] > 0
            assert set(row["implementation"].split("+")) <= {k.name for k in dispatch.KERNELS}
        cases = [row["case"] for row in rows if row["method"] == "dare_ties"]
        assert cases == ["norms cached", "new density", "statistics included"]
        assert {row["n"] for row in rows if row["method"] == "slerp"} == {1}

    def test_the_copy_moves_sources_once_and_every_result(self):
        world = materialise.make_world(4096 * 5, 3)
        mask = materialise.Candidates(METHODS["ties"], world, 2)
        assert mask.num_bytes() == 4096 * 5 * 2 * (3 + 1 + 2)
        span = materialise.Candidates(METHODS["linear"], world, 1)
        assert span.num_bytes() == 4096 * 5 * 2 * (3 + 1)

    def test_worlds_have_the_parameters_that_are_asked_for(self):
        shapes = list(materialise.shapes_of(4096 * 9000))
        assert shapes == [(4096, 4096), (4096, 4096), (4096, 808)]
        world = materialise.make_world(4096 * 100, 2)
        deltas = [(m[0].float() - world.base[0].float()).std() for m in world.models]
        # the noise, and what bfloat16 rounds off two numbers of 0.02: at most 2**-9 of each
        assert all(0.0010 < delta < 0.00102 for delta in deltas)
        assert not torch.equal(world.models[0][0], world.models[1][0])

    def test_results_are_the_methods(self):
        world = materialise.make_world(4096, 2)
        candidates = materialise.Candidates(METHODS["task_arithmetic"], world, 2)
        candidates.make()
        for values, (out_P,) in zip(candidates.values, candidates.outs, strict=True):
            base, weights = world.base[0].double(), values.per_model["weight"]
            deltas = [m[0].double() - base for m in world.models]
            total = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
            merged = base + values.shared["lambda"] * total
            # one rounding to bfloat16
            assert bool(((out_P.double() - merged).abs() <= 2**-8 * merged.abs() + 1e-9).all())

    def test_changing_candidates_are_other_ones_each_time(self):
        world = materialise.make_world(4096, 2)
        candidates = materialise.Candidates(METHODS["ties"], world, 1, changing=True)
        seen = []
        for _ in range(3):
            candidates.make()
            seen.append(candidates.values[0].per_model["density"])
        assert len(set(seen)) == 3

    def test_unknown_methods_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            materialise.main(["--method", "tie"])
        assert "invalid choice: 'tie'" in capsys.readouterr().err


def other(carry_out_all, can_run=dispatch._any):
    return Kernels("other", lambda: None, can_run, carry_out_all)


def one_bit_wrong(jobs):
    written = reference.carry_out_all(jobs)
    for job in jobs:
        bits = job.out_P.view(torch.int32 if job.out_P.itemsize == 4 else torch.int16)
        bits[-1] ^= 1
    return written


class TestEquality:
    @pytest.fixture
    def compare(self, monkeypatch, capsys):
        monkeypatch.setattr(equality, "needs_interpreter", lambda: False)

        def run(kernels, method):
            monkeypatch.setattr(equality, "KERNELS", (kernels, dispatch.REFERENCE))
            code = equality.main(["--json", "--method", method])
            rows = printed(capsys)
            assert all(row.keys() >= KEYS for row in rows)
            return code, rows

        return run

    def test_equal_bits_are_no_difference(self, compare):
        code, (row,) = compare(other(reference.carry_out_all), "slerp")
        assert (code, row["differing"], row["told"], row["left"]) == (0, 0, 0, 0)
        assert row["elements"] > 100_000
        assert row["case"] == "other on cpu == reference"

    def test_every_wrong_element_is_counted(self, compare):
        code, (row,) = compare(other(one_bit_wrong), "slerp")
        assert (code, row["told"]) == (1, 0)
        assert row["differing"] == row["jobs"] > 50

    def test_wrong_checksums_are_counted(self, compare):
        def tell(jobs):
            return [w._replace(checksum=w.checksum ^ 1) for w in reference.carry_out_all(jobs)]

        code, (row,) = compare(other(tell), "nearswap")
        assert (code, row["differing"]) == (1, 0)
        assert row["told"] == row["jobs"]

    def test_what_only_the_reference_can_do_is_said(self, compare):
        code, (row,) = compare(other(reference.carry_out_all, lambda job: False), "slerp")
        assert code == 0
        assert (row["case"], row["jobs"], row["elements"]) == ("reference only", 0, 0)
        assert row["left"] > 50

    def test_jobs_cover_what_they_say(self):
        jobs = list(equality.jobs_of(METHODS["linear"], equality.SHAPES, equality.NUM_MODELS))
        kinds = {(job.source_MP[0].dtype, job.out_P.dtype) for job in jobs}
        assert kinds == {(models, out) for _, models, out in equality.DTYPES}
        assert {len(job.source_MP) for job in jobs} == set(equality.NUM_MODELS)
        assert {job.dither is None for job in jobs} == {True, False}
        assert any(job.first for job in jobs)
        sources = [job.source_MP[0].data_ptr() for job in jobs]
        assert len(set(sources)) < len(sources), "no recipes share sources"

    def test_bits_are_compared_and_not_numbers(self):
        zeros = torch.zeros(4)
        assert equality.num_differing(zeros, -zeros) == 4
        nan = torch.full((4,), math.nan)
        assert equality.num_differing(nan, nan.clone()) == 0

    @pytest.mark.slow
    def test_the_interpreter_agrees(self, capsys):
        pytest.importorskip("triton")
        code = equality.main(["--json", "--method", "slerp"])
        rows = {row["implementation"]: row for row in printed(capsys)}
        assert code == 0
        assert rows["triton's interpreter"]["elements"] > 10_000


class TestMergeDisk:
    @pytest.mark.slow
    def test_rows_are_whole(self, capsys):
        words = ["--params", "1M", "--method", "ties", "--rounds", "1", "--json", "--profile"]
        merge_disk.main(words)
        row, *parts = printed(capsys)
        assert row.keys() >= KEYS
        assert (row["case"], row["method"], row["n"]) == ("merge to disk", "ties", 3)
        assert row["wall_s"] / row["copy_wall_s"] == pytest.approx(row["x_copy"])
        assert 0.9e6 < row["params"] < 1.1e6
        assert all(part["method"] == "ties" for part in parts)
        names = {part["case"].removeprefix("in it: ") for part in parts}
        known = {name for name, _ in merge_disk.PARTS} | {"rest"}
        assert len(names & known) >= 4

    def test_models_have_the_parameters_that_are_asked_for(self):
        for asked, tolerance in ((245_000_000, 0.05), (3_000_000, 0.02)):
            shapes = merge_disk.shapes(merge_disk.config_for(asked))
            found = sum(shape.numel() for shape in shapes.values())
            assert found == pytest.approx(asked, rel=tolerance)
