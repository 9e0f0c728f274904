"""The order of the training examples and the number of steps: functions of the settings alone.

So a resumed run takes the same examples as an uninterrupted one.
"""

import numpy as np


def epoch_order(cycles: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Example numbers of an epoch, (examples,): whole mismatch groups in an order drawn from (seed, epoch).

    `cycles`, (examples,), numbers the mismatch group of each example; a group's rows are contiguous (see `RowSet`).
    """
    boundaries = np.flatnonzero(np.diff(cycles)) + 1
    groups = np.split(np.arange(len(cycles)), boundaries)
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(groups))
    return np.concatenate([groups[number] for number in shuffled]) if len(cycles) else np.zeros(0, np.int64)


def num_steps(num_examples: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run. The last step of an epoch takes the examples that are left, so it may be smaller."""
    steps = -(-num_examples // batch_size) * num_epochs
    return steps if max_steps is None else min(steps, max_steps)
