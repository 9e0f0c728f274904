"""Python's search for cycles of garbage, kept away from what lives as long as the process.

Preparing makes many small objects for each row, none of them in a cycle that lasts, and Python would again and again go
through all that torch and transformers have brought into memory.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Objects that are made and not yet gone before Python looks for cycles among the young ones.
THRESHOLD = 50_000


@contextmanager
def looked_for_seldom() -> Iterator[None]:
    """Leave out what is in memory already, and look at the rest now and then."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
