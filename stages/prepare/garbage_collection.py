"""Python's cyclic garbage collector, kept away from objects that live as long as the process.

Preparing makes many small objects for each row, none of them in a reference cycle that lasts. With the default
thresholds Python would again and again traverse all that torch and transformers have brought into memory.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Objects made and not yet freed before Python looks for reference cycles among the young ones.
THRESHOLD = 50_000


@contextmanager
def gc_relaxed() -> Iterator[None]:
    """Exclude the objects that exist already from garbage collection, and collect the others rarely."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
