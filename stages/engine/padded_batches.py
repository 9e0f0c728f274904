"""Right-padded batches, for models that cannot take a pack: recurrences, ALiBi, attention sinks and the like.

In: lengths of rows.  Out: to which length each is padded, and which rows share a batch. What follows a row changes
nothing in it, because the model is causal.
"""

from collections.abc import Sequence

from stages.engine.packs import POSITION_MULTIPLE

# A batch of one row takes other kernels than a larger one, which round differently.
FEWEST_ROWS = 2
# Lengths between two powers of two; more of them mean less padding and smaller batches.
LENGTHS_PER_OCTAVE = 4


def padded_length(length: int) -> int:
    """The length to which a row is padded, a function of its own length alone: the next of 16, 32 ... 128, 160, 192 ...

    Kernels round differently at another length. So the float32 log-probs of a row on a CPU do not depend on the other
    rows of its batch, as in packs.
    """
    octave = 1 << max(0, length - 1).bit_length()
    step = max(POSITION_MULTIPLE, octave // (2 * LENGTHS_PER_OCTAVE))
    return -(-length // step) * step


def padded_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The row numbers of each batch: rows of one padded length, within `budget` positions or `FEWEST_ROWS` rows."""
    alike: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault(padded_length(length), []).append(row)
    found = []
    for length, rows in sorted(alike.items()):
        size = max(FEWEST_ROWS, budget // length)
        found += [rows[start : start + size] for start in range(0, len(rows), size)]
    return found


def examples_alike(lengths: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """The example numbers of each micro-batch, within `budget` padded positions; `lengths` are those of each example's rows.

    Examples of like lengths are together, so that their rows share batches. An example longer than the budget is alone.
    """
    padded = [sorted(map(padded_length, rows), reverse=True) for rows in lengths]
    found: list[list[int]] = []
    room = 0
    for example in sorted(range(len(padded)), key=lambda number: (padded[number], number)):
        size = sum(padded[example])
        if not found or size > room:
            found.append([])
            room = budget
        found[-1].append(example)
        room -= size
    return found
