"""A limit on the memory that a piece of work may add to this process, kept by the operating system.

In: nothing. Out: while a `MemoryLimit` is entered, an allocation beyond it fails, and Python raises `MemoryError`. Linux
counts what a process has to write to (RLIMIT_DATA); on other systems there is no limit.
"""

import os
import sys
import time
from pathlib import Path
from types import TracebackType

# Bytes. All threads of the process share them, so there is room for what a tokenizer takes meanwhile.
MEMORY_LIMIT = 2 << 30
# The limit follows what the process takes for other work, at most this often.
FOLLOW_SECONDS = 0.02


class MemoryLimit:
    """Keeps the limit of the process `MEMORY_LIMIT` above what it has when a piece of work begins."""

    def __init__(self) -> None:
        """Not entered yet; nothing is limited."""
        self._before: tuple[int, int] | None = None
        self._began_with, self._followed = 0, 0.0

    def __enter__(self) -> "MemoryLimit":
        """Set the limit."""
        if sys.platform == "linux":
            import resource

            self._before = resource.getrlimit(resource.RLIMIT_DATA)
            self.begin(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Set the limit that was there before."""
        if self._before is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, self._before)
        self._before, self._followed = None, 0.0

    def begin(self, now: float) -> None:
        """Count from `now` on (seconds of `time.monotonic`), for a new piece of work."""
        if self._before is None or now - self._followed < FOLLOW_SECONDS:
            return
        import resource

        self._began_with, self._followed = data_bytes(), now
        limits = [limit for limit in self._before if limit != resource.RLIM_INFINITY]
        resource.setrlimit(
            resource.RLIMIT_DATA, (min([self._began_with + MEMORY_LIMIT, *limits]), self._before[1])
        )

    def is_half_used(self) -> bool:
        """Whether half of the limit is taken, which leaves other threads the rest: they could not survive its end."""
        return self._before is not None and data_bytes() - self._began_with > MEMORY_LIMIT / 2


def data_bytes() -> int:
    """The memory of this process that it can write to (Linux)."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[5]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
