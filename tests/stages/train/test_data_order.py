"""The order of the examples and the number of steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.train.data_order import DataOrder, epoch_order, num_steps


@given(sizes=st.lists(st.integers(min_value=1, max_value=5), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_an_epoch_holds_whole_mismatch_groups_in_a_new_order(sizes: list[int], seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(groups, seed, 0)
    assert sorted(order) == list(range(len(groups)))
    runs = groups[order][np.flatnonzero(np.diff(groups[order], prepend=-1))]
    assert sorted(runs) == list(range(len(sizes)))
    assert np.array_equal(order, epoch_order(groups, seed, 0))
    if len(sizes) > 8:
        assert not np.array_equal(order, epoch_order(groups, seed, 1))


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "limit", "steps"),
    [(10, 4, 1, None, 3), (8, 4, 3, None, 6), (10, 4, 2, 5, 5), (3, 64, 1, None, 1), (10, 4, 1, 100, 3)],
)
def test_the_last_step_of_an_epoch_may_be_smaller(examples, batch, epochs, limit, steps) -> None:
    assert num_steps(examples, batch, epochs, limit) == steps


def by_splitting(groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order as it was first defined: the groups as arrays, shuffled and joined."""
    parts = np.split(np.arange(len(groups)), np.flatnonzero(np.diff(groups)) + 1)
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(parts))
    return np.concatenate([parts[number] for number in shuffled])


@given(
    sizes=st.lists(st.integers(min_value=1, max_value=5), min_size=1, max_size=30),
    seed=st.integers(0, 5),
    batch_size=st.integers(1, 9),
)
def test_the_examples_of_a_step_do_not_depend_on_the_steps_before(sizes, seed, batch_size) -> None:
    """A run that begins at any step, as a resumed one does, takes the same examples, in the order of version 1."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    steps = -(-len(groups) // batch_size)
    order = DataOrder(groups, seed, batch_size)
    whole = [order.examples_of(step) for step in range(1, 2 * steps + 1)]
    for epoch in (0, 1):
        of_epoch = np.concatenate(whole[epoch * steps : (epoch + 1) * steps])
        assert np.array_equal(of_epoch, by_splitting(groups, seed, epoch))
    for step in (2 * steps, 1, steps):
        assert np.array_equal(DataOrder(groups, seed, batch_size).examples_of(step), whole[step - 1])
        assert np.array_equal(order.examples_of(step), whole[step - 1])
