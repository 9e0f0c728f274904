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


@pytest.mark.slow
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


TALKS = st.lists(st.integers(0, 6), min_size=1, max_size=40)


def steps_of(order: DataOrder, count: int, epoch: int) -> list[np.ndarray]:
    return [order.examples_of(epoch * count + step) for step in range(1, count + 1)]


@pytest.mark.slow
@given(labels=TALKS, seed=st.integers(0, 3), batch_size=st.integers(1, 12))
def test_a_conversation_is_in_one_step_unless_it_is_longer(labels, seed, batch_size) -> None:
    """As many steps as without, each example once, in steps of `batch_size` to within the longest conversation."""
    talks = np.array(labels)
    order = DataOrder(np.zeros(len(talks), int), seed, batch_size, talks)
    count = num_steps(len(talks), batch_size, 1, None)
    longest = min(batch_size, int(np.bincount(talks).max()))
    for epoch in (0, 1):
        steps = steps_of(order, count, epoch)
        assert sorted(np.concatenate(steps)) == list(range(len(talks)))
        assert all(0 < len(step) < batch_size + longest for step in steps)
        ends = np.cumsum([len(step) for step in steps])[:-1]
        assert all(0 <= batch_size * (n + 1) - end < longest for n, end in enumerate(ends))
        for talk, size in zip(*np.unique(talks, return_counts=True), strict=True):
            holding = sum(talk in talks[step] for step in steps)
            assert holding == 1 if size <= batch_size else holding <= -(-size // batch_size)


@pytest.mark.slow
@given(labels=TALKS, seed=st.integers(0, 3), batch_size=st.integers(1, 12))
def test_conversations_of_a_step_do_not_depend_on_the_steps_before(labels, seed, batch_size) -> None:
    talks = np.array(labels)
    groups, count = np.zeros(len(talks), int), num_steps(len(talks), batch_size, 1, None)
    order = DataOrder(groups, seed, batch_size, talks)
    whole = [*steps_of(order, count, 0), *steps_of(order, count, 1)]
    for step in (2 * count, 1, count):
        fresh = DataOrder(groups, seed, batch_size, talks)
        assert np.array_equal(fresh.examples_of(step), whole[step - 1])


def test_conversations_are_in_another_order_in_each_epoch_and_for_each_seed() -> None:
    talks = np.repeat(np.arange(20), 3)
    taken = {
        tuple(DataOrder(np.zeros(60, int), seed, 6, talks).examples_of(step).tolist())
        for seed in (0, 1)
        for step in (1, 11)
    }
    assert len(taken) == 4


def test_what_is_said_of_steps_and_of_conversations_longer_than_a_step() -> None:
    talks = np.repeat([0, 1, 2], [9, 2, 2])
    said = DataOrder(np.zeros(13, int), 0, 4, talks).summary()
    assert said is not None
    assert "13 examples are 3 conversations, the longest of 9" in said
    assert "1 of them with more than train.batch_size=4" in said
    assert DataOrder(np.zeros(13, int), 0, 4).summary() is None
