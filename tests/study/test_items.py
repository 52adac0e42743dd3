"""Results per item survive kills and come back exactly."""

import math

import pytest

from evomerge.errors import StudyError
from evomerge.evaluate.evaluator import TaskItems
from evomerge.study.items import ItemStore, ScoredChunk


def chunk(index, value=0.1 + 0.2):
    values = {"acc,none": (value, 1.0), "ppl,none": ([1.5, 2], [math.pi, 3])}
    answers = {
        "loglikelihoods": ([-math.pi, -1e-300], [-2.5, -0.0]),
        "greedy": ([True, False], [False, False]),
        "chosen": (1, 0),
        "gold": (None, [0, 1]),
        "text": ("a\nb", "ü"),
    }
    items = TaskItems((3, 5), values, answers)
    return ScoredChunk(index, {"task": items}, "digest", "worker", 0.25, 1e-17)


def test_round_trip_is_exact(tmp_path):
    store = ItemStore(tmp_path)
    store.add("hash", "search", chunk(0))
    store.add("hash", "search", chunk(2))
    assert store.read("hash", "search") == {0: chunk(0), 2: chunk(2)}
    assert store.read("hash", "confirm") == {}
    assert store.read("other", "search") == {}


OLD = (
    '{"chunk":1,"digest":"d","worker":"w","seconds_merge":0.25,"seconds_score":0.5,'
    '"tasks":{"task":{"ids":[3,5],"values":{"acc,none":[0.1,null]}}}}'
)


def test_lines_of_earlier_versions_are_read_beside_new_ones(tmp_path):
    store = ItemStore(tmp_path)
    store.add("hash", "search", chunk(0))
    path = next(tmp_path.rglob("*.jsonl"))
    path.write_text(path.read_text() + OLD + "\n")
    store.add("hash", "search", chunk(2))
    old = ScoredChunk(
        1, {"task": TaskItems((3, 5), {"acc,none": (0.1, None)})}, "d", "w", 0.25, 0.5
    )
    assert store.read("hash", "search") == {0: chunk(0), 1: old, 2: chunk(2)}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_off_by_a_kill_is_ignored_and_mended_by_the_next(tmp_path, cut):
    store = ItemStore(tmp_path)
    store.add("hash", "search", chunk(0))
    store.add("hash", "search", chunk(1))
    path = next(tmp_path.rglob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert set(store.read("hash", "search")) == ({0, 1} if cut == 1 else {0})
    store.add("hash", "search", chunk(2))
    assert {0, 2} <= set(store.read("hash", "search"))
    assert store.read("hash", "search")[2] == chunk(2)


@pytest.mark.parametrize(
    "line",
    ["1", "{}", "null", "[]", '"x"', '{"packed": "x"}', '{"packed": 1}', '{"tasks": 1}', '{"tasks": {"t": 1}}',
     '{"chunk": [], "tasks": {}, "digest": "", "worker": "", "seconds_merge": 0, "seconds_score": 0}'],
)  # fmt: skip
def test_a_line_that_is_no_chunk_is_ignored(tmp_path, line):
    store = ItemStore(tmp_path)
    store.add("hash", "search", chunk(0))
    path = next(tmp_path.rglob("*.jsonl"))
    path.write_text(f"{line}\n{path.read_text()}{line}\n")
    store.add("hash", "search", chunk(1))
    assert store.read("hash", "search") == {0: chunk(0), 1: chunk(1)}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "items").write_text("a file in the way")
    with pytest.raises(StudyError, match="results per item cannot be written"):
        ItemStore(tmp_path / "items").add("hash", "search", chunk(0))
