"""Which examples run together: pure functions of lengths, shared by all stages.

An example costs its prompt once plus all but the last token of each completion. Examples are packed
whole into rows of at most `budget` tokens, and packs are dealt to ranks; neither the budget nor the
number of ranks changes what is computed, only where.
"""

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit-decreasing packs of item numbers, each within `budget` tokens unless one item exceeds it.

    Deterministic: ties go to the lower item number and the older pack. O(n log n).
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack number), sorted
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        size = lengths[item]
        position = bisect.bisect_left(open_packs, (size, -1))
        if position < len(open_packs):
            room, number = open_packs.pop(position)
            packs[number].append(item)
        else:
            room, number = budget, len(packs)
            packs.append([item])
        if room - size > 0:
            bisect.insort(open_packs, (room - size, number))
    return packs


def deal(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Packs of each rank: the costliest first, always to the rank with the least so far."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for number in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        ranks[rank].append(number)
        loads[rank] += costs[number]
    return ranks


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
