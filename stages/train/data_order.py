"""The order of the training examples and the number of steps: functions of the settings and the rows alone.

So a resumed run takes the same examples as an uninterrupted one, and all ranks agree.
"""

import numpy as np


def epoch_order(groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Example numbers of an epoch, (examples,): whole groups in an order drawn from (seed, epoch).

    `groups`, (examples,), is the number of the group of each example; the examples of a group are contiguous.
    """
    if not len(groups):
        return np.zeros(0, np.int64)
    starts = _starts(groups)
    lengths = np.diff(np.append(starts, len(groups)))
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(starts))
    places = np.cumsum(lengths[shuffled]) - lengths[shuffled]  # of each group in the order
    return np.arange(len(groups)) + np.repeat(starts[shuffled] - places, lengths[shuffled])


class DataOrder:
    """The examples of each step of a run. The order of an epoch is computed once, at its first step."""

    def __init__(
        self, mismatch_groups: np.ndarray, seed: int, batch_size: int, conversations: np.ndarray | None = None
    ) -> None:
        """`mismatch_groups` and `seed` as in `epoch_order`; `conversations`, (examples,), is the number of each example's.

        Where conversations are given, they are shuffled in place of mismatch groups, and one is never in two steps unless
        it has more than `batch_size` examples.
        """
        self._examples, self._groups = np.arange(len(mismatch_groups)), mismatch_groups
        self._conversations = conversations
        if conversations is not None:
            self._examples = np.argsort(conversations, kind="stable")
            self._groups = _parts(conversations[self._examples], batch_size)
        self._seed, self._batch_size = seed, batch_size
        self._steps_per_epoch = -(-len(mismatch_groups) // batch_size)
        self._epoch, self._order, self._ends = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def examples_of(self, step: int) -> np.ndarray:
        """Example numbers of a step, (examples,); steps count from 1. A function of the seed and the step alone."""
        epoch, index = divmod(step - 1, self._steps_per_epoch)
        if epoch != self._epoch:
            order = epoch_order(self._groups, self._seed, epoch)
            self._epoch, self._order = epoch, self._examples[order]
            self._ends = self._step_ends(self._groups[order])
        return self._order[self._ends[index - 1] if index else 0 : self._ends[index]]

    def _step_ends(self, groups: np.ndarray) -> np.ndarray:
        """Where each step of an epoch ends, from the groups in their order.

        Step n ends at n * batch_size; where conversations are kept together, behind the last one that ends by then. None is
        longer than batch_size, so every step has one, and there are as many steps in either case.
        """
        ends = np.arange(1, self._steps_per_epoch + 1) * self._batch_size
        if self._conversations is None:
            return ends
        whole = np.append(_starts(groups)[1:], len(groups))
        return whole[np.searchsorted(whole, ends, side="right") - 1]

    def summary(self) -> str | None:
        """How conversations are kept together, one line; None where they are not."""
        if self._conversations is None:
            return None
        sizes = np.unique(self._conversations, return_counts=True)[1]
        steps = [len(self.examples_of(step)) for step in range(1, self._steps_per_epoch + 1)]
        line = (
            f"train.keep_together=conversation: {sum(sizes):,} examples are {len(sizes):,} conversations, the longest of "
            f"{max(sizes):,}; a step has {min(steps):,} to {max(steps):,} examples, {np.mean(steps):.1f} on average"
        )
        split = int(np.sum(sizes > self._batch_size))
        return line + (
            f". {split:,} of them with more than train.batch_size={self._batch_size} are spread over several steps"
            if split
            else ""
        )


def _starts(groups: np.ndarray) -> np.ndarray:
    """Where each group begins: (groups,)."""
    return np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1])


def _parts(groups: np.ndarray, size: int) -> np.ndarray:
    """A number for each example, equal in a group and contiguous; a group of more than `size` becomes several."""
    starts = _starts(groups)
    places = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    return np.cumsum(places % size == 0)


def num_steps(num_examples: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run. The last step of an epoch takes the examples that are left, so it may be smaller."""
    steps = -(-num_examples // batch_size) * num_epochs
    return steps if max_steps is None else min(steps, max_steps)
