"""Which examples share a pack, and which rank scores it: pure functions of lengths.

In: the length of each example in positions (`packed_length`) and the token budget of a pack.  Out: the examples of each
pack, whole examples always, and the packs of each rank. Neither the budget nor the number of ranks changes a result.
"""

import bisect
from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the item numbers of each pack, within `budget` tokens.

    An item longer than the budget has a pack of its own. Deterministic: ties go to the lower item number and to the
    older pack. O(n log n).
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
    """The packs of each rank: the longest pack first, always to the rank with the least cost so far."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for number in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        ranks[rank].append(number)
        loads[rank] += costs[number]
    return ranks
