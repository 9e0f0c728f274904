"""The order of the training examples and the number of steps: functions of the settings alone.

So a resumed run takes the same examples as an uninterrupted one.
"""

import numpy as np


def epoch_order(mismatch_groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Example numbers of an epoch, (examples,): whole mismatch groups in an order drawn from (seed, epoch).

    `mismatch_groups`, (examples,), is the number of the group of each example; the examples of a group are contiguous.
    """
    if not len(mismatch_groups):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(mismatch_groups)) + 1])
    lengths = np.diff(np.append(starts, len(mismatch_groups)))
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(starts))
    places = np.cumsum(lengths[shuffled]) - lengths[shuffled]  # of each group in the order
    return np.arange(len(mismatch_groups)) + np.repeat(starts[shuffled] - places, lengths[shuffled])


class DataOrder:
    """The examples of each step of a run. The order of an epoch is computed once, at its first step."""

    def __init__(self, mismatch_groups: np.ndarray, seed: int, batch_size: int) -> None:
        """`mismatch_groups` and `seed` as in `epoch_order`."""
        self._groups, self._seed, self._batch_size = mismatch_groups, seed, batch_size
        self._steps_per_epoch = -(-len(mismatch_groups) // batch_size)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def examples_of(self, step: int) -> np.ndarray:
        """Example numbers of a step, (examples,); steps count from 1. A function of the seed and the step alone."""
        epoch, index = divmod(step - 1, self._steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._groups, self._seed, epoch)
        return self._order[index * self._batch_size : (index + 1) * self._batch_size]


def num_steps(num_examples: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run. The last step of an epoch takes the examples that are left, so it may be smaller."""
    steps = -(-num_examples // batch_size) * num_epochs
    return steps if max_steps is None else min(steps, max_steps)
