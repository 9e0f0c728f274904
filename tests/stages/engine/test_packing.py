"""Packing and dealing: nothing lost, nothing doubled, within budget, the same for everyone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.engine.packing import deal, pack_lengths

lengths_of = st.lists(st.integers(min_value=1, max_value=300), max_size=80)


@given(lengths=lengths_of, budget=st.integers(min_value=1, max_value=600))
def test_every_item_is_in_one_pack_and_packs_fit(lengths: list[int], budget: int) -> None:
    packs = pack_lengths(lengths, budget)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    for items in packs:
        assert sum(lengths[item] for item in items) <= budget or len(items) == 1


@given(lengths=lengths_of)
def test_two_packs_never_fit_into_one(lengths: list[int]) -> None:
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
