"""Which examples a training step takes: a function of (seed, epoch, step) alone, so that a resumed run is the same run."""

import numpy as np


def epoch_order(cycles: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Example numbers of an epoch: whole cycles in an order drawn from (seed, epoch)."""
    boundaries = np.flatnonzero(np.diff(cycles)) + 1
    groups = np.split(np.arange(len(cycles)), boundaries)
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(groups))
    return np.concatenate([groups[number] for number in shuffled]) if len(cycles) else np.zeros(0, np.int64)


def num_steps(num_examples: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run; an epoch's last step may be smaller, and loses or doubles nothing."""
    steps = -(-num_examples // batch_size) * num_epochs
    return steps if max_steps is None else min(steps, max_steps)
