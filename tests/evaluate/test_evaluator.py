"""Joining the results of chunks."""

from hypothesis import given
from hypothesis import strategies as st

from evomerge.evaluate.evaluator import TaskItems, join_results


def items_of(ids):
    return TaskItems(tuple(ids), {"acc,none": tuple(i % 3 for i in ids)})


@given(
    st.dictionaries(st.sampled_from("ab"), st.sets(st.integers(0, 50), min_size=1), min_size=1),
    st.randoms(use_true_random=False),
    st.integers(1, 5),
)
def test_parts_of_any_cut_in_any_order_join_to_the_whole(tasks, rng, num_parts):
    parts = [{} for _ in range(num_parts)]
    for task, ids in tasks.items():
        cut = {i: rng.randrange(num_parts) for i in sorted(ids)}
        for k, part in enumerate(parts):
            mine = [i for i, where in cut.items() if where == k]
            if mine:
                part[task] = items_of(mine)
    rng.shuffle(parts)
    whole = {task: items_of(sorted(ids)) for task, ids in tasks.items()}
    assert join_results(parts) == whole


def test_a_metric_that_a_part_lacks_is_none_there():
    parts = [
        {"a": TaskItems((3,), {"x": (1.0,), "y": (2.0,)})},
        {"a": TaskItems((1, 4), {"x": (0.0, 5.0)})},
    ]
    joined = join_results(parts)["a"]
    assert joined.ids == (1, 3, 4)
    assert joined.values == {"x": (0.0, 1.0, 5.0), "y": (None, 2.0, None)}
    assert join_results(parts[::-1])["a"] == joined
