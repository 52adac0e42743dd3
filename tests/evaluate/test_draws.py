"""Which items have which role, and how they are cut into chunks: properties over all sizes."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.evaluate.items import content_hash, deal, draw_order, draw_roles, first_copies

STRATA = st.lists(st.integers(1, 30), min_size=1, max_size=4).map(
    lambda sizes: {
        f"s{k}": list(range(sum(sizes[:k]), sum(sizes[: k + 1]))) for k in range(len(sizes))
    }
)
SEED = st.integers(0, 2**62)


@st.composite
def order_and_counts(draw):
    order = draw(st.permutations(range(draw(st.integers(1, 60)))))
    left, counts = len(order), {}
    for role in ("search", "confirm", "report"):
        counts[role] = draw(st.integers(0, left))
        left -= counts[role]
    return order, counts


@given(STRATA, SEED)
def test_the_order_holds_every_document_once(strata, seed):
    documents = sorted(i for ids in strata.values() for i in ids)
    assert sorted(draw_order(strata, seed)) == documents


@given(STRATA, SEED, st.data())
def test_neighbours_in_the_order_hold_strata_in_proportion(strata, seed, data):
    order = draw_order(strata, seed)
    start = data.draw(st.integers(0, len(order)))
    window = order[start : data.draw(st.integers(start, len(order)))]
    for ids in strata.values():
        share = len(ids) / len(order)
        found = len(set(window).intersection(ids))
        # one for the stratum's own rounding, one for that of each stratum in the length of the
        # window
        assert abs(found - share * len(window)) <= 1 + share * len(strata)


def test_the_order_is_fixed():
    # the numbers are what studies were made with: a change here changes every study's items
    assert draw_order({"": range(8)}, 0) == [0, 1, 2, 7, 4, 5, 3, 6]


def test_seeds_and_documents_decide_the_order():
    plain = {"": list(range(40))}
    assert draw_order(plain, 1) != draw_order(plain, 2)
    # documents that are added at the end of a data set do not reshuffle the others
    longer = draw_order({"": list(range(50))}, 1)
    assert [i for i in longer if i < 40] == draw_order(plain, 1)


@given(order_and_counts())
def test_roles_have_what_they_asked_for_and_nothing_in_common(asked):
    order, counts = asked
    roles = draw_roles(order, counts)
    assert {role: len(ids) for role, ids in roles.items()} == counts
    together = [i for ids in roles.values() for i in ids]
    assert len(set(together)) == len(together)
    assert all(ids == sorted(ids) for ids in roles.values())


@given(order_and_counts(), st.sampled_from(["search", "confirm", "report"]))
def test_a_raised_count_only_adds_items(asked, role):
    order, counts = asked
    fewer = {**counts, role: counts[role] // 2}
    assert set(draw_roles(order, fewer)[role]) <= set(draw_roles(order, counts)[role])


@given(order_and_counts())
def test_search_and_confirm_do_not_depend_on_each_other(asked):
    order, counts = asked
    roles = draw_roles(order, counts)
    assert roles["search"] == draw_roles(order, {"search": counts["search"]})["search"]
    assert roles["confirm"] == draw_roles(order, {"confirm": counts["confirm"]})["confirm"]


@given(order_and_counts(), st.sampled_from(["search", "confirm", "report"]))
def test_none_is_all_that_is_left(asked, role):
    order, counts = asked
    roles = draw_roles(order, {**counts, role: None})
    assert sorted(i for ids in roles.values() for i in ids) == sorted(order)
    assert all(len(roles[other]) == counts[other] for other in counts if other != role)


@settings(deadline=None)
@given(st.lists(STRATA, min_size=1, max_size=3), st.integers(1, 12), SEED)
def test_each_chunk_is_an_image_of_the_whole(tasks, num_chunks, seed):
    strata = {f"t{k}": groups for k, groups in enumerate(tasks)}
    total = sum(len(ids) for groups in tasks for ids in groups.values())
    chunks = deal(strata, num_chunks, seed)
    assert len(chunks) == min(num_chunks, total)
    dealt = Counter((task, i) for chunk in chunks for task, ids in chunk.items() for i in ids)
    assert set(dealt.values()) == {1}
    assert len(dealt) == total
    for task, groups in strata.items():
        parts = [chunk.get(task, ()) for chunk in chunks]
        assert all(list(part) == sorted(part) for part in parts)
        assert_even([len(part) for part in parts])
        for ids in groups.values():
            assert_even([len(set(part).intersection(ids)) for part in parts])
    assert_even([sum(map(len, chunk.values())) for chunk in chunks])


def assert_even(sizes):
    assert max(sizes) - min(sizes) <= 1


def test_strata_do_not_fall_into_step_with_chunks():
    # two strata by turns over two chunks would give each chunk one of them
    chunks = deal({"t": {"even": range(0, 20, 2), "odd": range(1, 20, 2)}}, 2, 0)
    assert [sum(i % 2 for i in chunk["t"]) for chunk in chunks] == [5, 5]


def test_copies_are_found_whatever_their_number():
    documents = [{"id": i, "q": q, "a": [1, 2]} for i, q in enumerate("xyxzy")]
    assert first_copies([content_hash(d) for d in documents]) == [0, 1, 3]
    assert content_hash({"q": "x", "a": 1}) == content_hash({"a": 1, "q": "x"})
    assert content_hash({"q": "x", "a": 1}) != content_hash({"q": "x", "a": "1"})
