"""Shares of work: which part of it this process does, of independent jobs or of torchrun's ranks."""

import os
from dataclasses import dataclass

from cache.errors import UsageError


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that divide the work; it does every `count`-th part, from number `index` on."""

    index: int = 0
    count: int = 1

    def does(self, number: int) -> bool:
        """Whether this part is its own."""
        return number % self.count == self.index


def choose_worker(share: str | None) -> Worker:
    """The worker of `--shard i/N` (i from 1), else of torchrun's environment; raises `UsageError` for anything else."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if share is None:
        return Worker(rank, size)
    index, slash, count = share.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard {share}: expected i/N with i from 1 to N, for example --shard 1/8.")
    if size > 1:
        raise UsageError(
            "--shard is for independent jobs, and this one is a rank under torchrun. Start it without torchrun."
        )
    return Worker(int(index) - 1, int(count))
