"""The tree of rows, and the packs it is cut into: every row whole, every shared run once, the same for everyone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.engine.packing import plan_packs, sized_packs
from stages.engine.prefix_tree import TreeIndex, grow, num_tokens

# Few different tokens, so that rows share beginnings, go on from each other and are equal.
ROW = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda ids: np.array(ids, np.int32))
ROWS = st.lists(ROW, min_size=1, max_size=20)
EXAMPLES = st.lists(st.lists(ROW, min_size=1, max_size=3), min_size=1, max_size=12)


def prefixes(rows: list[np.ndarray]) -> set[tuple[int, ...]]:
    """Every beginning of every row, each once."""
    return {tuple(row[:size].tolist()) for row in rows for size in range(1, len(row) + 1)}


@given(ROWS)
def test_every_row_is_in_the_tree_and_every_beginning_once(rows: list[np.ndarray]) -> None:
    tree = grow(rows)
    for row, positions in zip(rows, tree.rows, strict=True):
        assert tree.tokens[positions].tolist() == row.tolist()
        assert (np.diff(positions) > 0).all()
    assert len(tree.tokens) == len(prefixes(rows)) == num_tokens(rows)


@pytest.mark.slow
@given(ROWS, st.randoms())
def test_the_order_of_the_rows_does_not_change_the_tree(rows: list[np.ndarray], random) -> None:
    order = random.sample(range(len(rows)), len(rows))
    shuffled = grow([rows[number] for number in order])
    assert shuffled.runs == grow(rows).runs
    assert shuffled.tokens.tolist() == grow(rows).tokens.tolist()


@given(ROWS)
def test_a_position_is_seen_by_what_follows_it_in_its_rows_and_by_nothing_else(
    rows: list[np.ndarray],
) -> None:
    """What flex attention masks by, and what the gradient goes through, against the rows themselves."""
    tree = grow(rows)
    index = TreeIndex(tree.runs)
    seen = {pair for positions in tree.rows for pair in itertools.combinations_with_replacement(positions, 2)}
    by_ends = {
        (key, query) for key in range(index.size) for query in range(key, max(key + 1, index.ends[key]))
    }
    assert by_ends == seen
    by_nodes = set()
    for node in index.nodes:
        own = range(node.start, node.start + node.length)
        by_nodes |= set(itertools.combinations_with_replacement(own, 2))
        by_nodes |= set(itertools.product(own, range(node.start + node.length, node.end)))
    assert by_nodes == seen
    for positions in tree.rows:
        assert index.places[positions].tolist() == list(range(len(positions)))


@pytest.mark.slow
@given(ROWS)
def test_the_row_of_a_run_is_what_was_written_last_at_each_place(rows: list[np.ndarray]) -> None:
    """How attention gathers the keys of a row."""
    tree = grow(rows)
    row_at = np.zeros(12, np.int32)
    found = set()
    for run in tree.runs:
        row_at[run.place : run.place + run.length] = tree.tokens[run.start : run.start + run.length]
        found.add(tuple(row_at[: run.place + run.length].tolist()))
    longest = {tuple(row.tolist()) for row in rows}
    assert found == {
        row for row in longest if not any(row != other == (*row, *other[len(row) :]) for other in longest)
    }


@given(ROWS)
def test_every_branch_saves_tokens(rows: list[np.ndarray]) -> None:
    """A node is shared by two rows or more, or it is the end of one: no run is cut where nothing branches."""
    tree = grow(rows)
    for node in TreeIndex(tree.runs).nodes:
        last = node.start + node.length - 1
        if node.end > last + 1:
            following = {
                int(tree.tokens[positions[place + 1]])
                for positions in tree.rows
                for place in [node.place + node.length - 1]
                if len(positions) > place + 1 and positions[place] == last
            }
            assert len(following) > 1


@pytest.mark.slow
@given(EXAMPLES, st.integers(1, 40))
def test_packs_hold_every_example_once_within_the_budget(
    examples: list[list[np.ndarray]], budget: int
) -> None:
    packs = sized_packs(examples, budget)
    assert sorted(example for _, pack in packs for example in pack) == list(range(len(examples)))
    for size, pack in packs:
        assert size == len(prefixes([row for example in pack for row in examples[example]]))
        assert size <= budget or len(pack) == 1


@pytest.mark.slow
@given(ROWS, st.integers(1, 40), st.randoms())
def test_the_order_of_the_examples_does_not_change_the_packs(
    rows: list[np.ndarray], budget: int, random
) -> None:
    distinct = list({row.tobytes(): row for row in rows}.values())

    def content(order: list[int]) -> list[list[list[int]]]:
        packs = plan_packs([[distinct[number]] for number in order], budget)
        return [[distinct[order[item]].tolist() for item in pack] for pack in packs]

    numbers = list(range(len(distinct)))
    assert content(random.sample(numbers, len(numbers))) == content(numbers)


def test_what_many_examples_begin_with_is_in_as_few_packs_as_can_be() -> None:
    """Two system prompts of 1,000 tokens, in turns, each with 20 questions of 150: 6 or 7 questions fit beside one."""
    random = np.random.default_rng(0)
    systems = [random.integers(0, 9_000, 1_000).astype(np.int32) for _ in range(2)]
    examples = [
        [np.concatenate([systems[number % 2], random.integers(0, 9_000, 150).astype(np.int32)])]
        for number in range(40)
    ]
    packs = plan_packs(examples, 2_048)
    for pack in packs:
        assert len({example % 2 for example in pack}) == 1
    assert len(packs) == 2 * -(-20 // 6)
