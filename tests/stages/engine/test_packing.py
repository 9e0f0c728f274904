"""Packing and dealing: nothing lost, nothing doubled, within budget, the same for everyone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.engine.packing import deal, pack_lengths
from stages.engine.packs import POSITION_MULTIPLE
from stages.engine.padded_batches import FEWEST_ROWS, examples_alike, padded_batches, padded_length

lengths_of = st.lists(st.integers(min_value=1, max_value=300), max_size=80)


@given(lengths=lengths_of, budget=st.integers(min_value=1, max_value=600))
def test_every_item_is_in_one_pack_and_packs_fit(lengths: list[int], budget: int) -> None:
    packs = pack_lengths(lengths, budget)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    for items in packs:
        assert sum(lengths[item] for item in items) <= budget or len(items) == 1


@given(lengths=lengths_of)
def test_no_two_packs_would_fit_into_one(lengths: list[int]) -> None:
    """Best fit leaves no two packs that could have shared a row."""
    loads = sorted(sum(lengths[item] for item in items) for items in pack_lengths(lengths, 300))
    assert len(loads) < 2 or loads[0] + loads[1] > 300


@given(costs=lengths_of, world_size=st.integers(min_value=1, max_value=7))
def test_ranks_share_everything_evenly(costs: list[int], world_size: int) -> None:
    ranks = deal(costs, world_size)
    assert sorted(item for items in ranks for item in items) == list(range(len(costs)))
    loads = [sum(costs[item] for item in items) for items in ranks]
    # Each rank was the lightest when it got its last item.
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_packs_of_hh_like_lengths_are_full() -> None:
    """Lengths of pairs with shared prompts in hh-rlhf are roughly log-normal, 209 on average."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.2, 0.55, 2000).astype(int), 10, 900).tolist()
    packs = pack_lengths(lengths, 4096)
    assert sum(lengths) / (4096 * len(packs)) >= 0.97


LENGTHS = st.lists(st.integers(1, 5_000), min_size=1, max_size=60)


@given(st.integers(0, 100_000))
def test_a_padded_length_is_a_whole_multiple_and_wastes_little(length: int) -> None:
    padded = padded_length(length)
    assert padded % POSITION_MULTIPLE == 0
    assert 0 <= padded - length < max(POSITION_MULTIPLE, length / 4 + 1)
    assert padded_length(padded) == padded


@given(LENGTHS, st.integers(1, 10_000))
def test_padded_batches_hold_every_row_once_and_rows_of_one_padded_length(
    lengths: list[int], budget: int
) -> None:
    batches = padded_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        [width] = {padded_length(lengths[row]) for row in batch}
        assert len(batch) <= FEWEST_ROWS or len(batch) * width <= budget


@given(st.lists(st.lists(st.integers(1, 3_000), min_size=1, max_size=4), min_size=1), st.integers(1, 10_000))
def test_examples_alike_are_a_partition_within_the_budget(lengths: list[list[int]], budget: int) -> None:
    packs = examples_alike(lengths, budget)
    assert sorted(example for pack in packs for example in pack) == list(range(len(lengths)))
    for pack in packs:
        size = sum(padded_length(length) for example in pack for length in lengths[example])
        assert size <= budget or len(pack) == 1
