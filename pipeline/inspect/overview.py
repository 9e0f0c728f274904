"""Statistics of a rows artifact: tokens by kind, and lengths of prompts and completions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEPS = (1, 2, 5)
MAX_BINS = 12


@dataclass(frozen=True)
class Histogram:
    """Lengths in tokens; a bin is `(shortest, longest, count)`."""

    name: str
    bins: list[tuple[int, int, int]]
    median: int
    p90: int
    longest: int

    @classmethod
    def of(cls, name: str, lengths: np.ndarray) -> "Histogram":
        """At most `MAX_BINS` bins of a round width, from the first that is not empty."""
        longest = int(lengths.max())
        width = next(
            step * 10**power
            for power in range(12)
            for step in STEPS
            if longest <= step * 10**power * MAX_BINS
        )
        counts = np.bincount((lengths - 1).clip(0) // width)
        first = int(counts.nonzero()[0][0])
        bins = [
            (index * width + 1, (index + 1) * width, int(counts[index]))
            for index in range(first, len(counts))
        ]
        median, p90 = (int(value) for value in np.percentile(lengths, (50, 90)))
        return cls(name, bins, median, p90, longest)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"median": self.median, "p90": self.p90, "max": self.longest, "bins": self.bins}


# Not in rows of an earlier version.
SHARED = ("tokens_without_sharing", "tokens_of_tree")


@dataclass(frozen=True)
class Overview:
    """The whole artifact; `tokens` counts a prompt once for all its completions."""

    folder: Path
    counts: Mapping[str, Any]
    tokenizer: str
    histograms: list[Histogram]
    tokens: int
    trained_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "artifact": str(self.folder),
            "tokens": self.tokens,
            **{name: self.counts[name] for name in SHARED if name in self.counts},
            "completion_tokens": self.completion_tokens,
            "trained_tokens": self.trained_tokens,
            "cuts": self.counts["cuts"],
            "lengths": {histogram.name: histogram.as_json() for histogram in self.histograms},
        }
