"""The order of the examples and the number of steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.train.data_order import epoch_order, num_steps


@given(sizes=st.lists(st.integers(min_value=1, max_value=5), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_an_epoch_holds_whole_cycles_in_another_order_each_time(sizes: list[int], seed: int) -> None:
    cycles = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(cycles, seed, 0)
    assert sorted(order) == list(range(len(cycles)))
    runs = cycles[order][np.flatnonzero(np.diff(cycles[order], prepend=-1))]
    assert sorted(runs) == list(range(len(sizes)))
    assert np.array_equal(order, epoch_order(cycles, seed, 0))
    if len(sizes) > 8:
        assert not np.array_equal(order, epoch_order(cycles, seed, 1))


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "limit", "steps"),
    [(10, 4, 1, None, 3), (8, 4, 3, None, 6), (10, 4, 2, 5, 5), (3, 64, 1, None, 1), (10, 4, 1, 100, 3)],
)
def test_the_last_step_of_an_epoch_may_be_smaller(examples, batch, epochs, limit, steps) -> None:
    assert num_steps(examples, batch, epochs, limit) == steps
