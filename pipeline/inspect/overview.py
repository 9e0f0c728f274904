"""A rows artifact in numbers: how many tokens of which kind, and how long prompts and completions are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEPS = (1, 2, 5)
MAX_BINS = 12


@dataclass(frozen=True)
class Histogram:
    """How many prompts or completions have how many tokens: `(first, last, count)` for each bin."""

    name: str
    bins: list[tuple[int, int, int]]
    median: int
    p90: int
    longest: int

    @classmethod
    def of(cls, name: str, lengths: np.ndarray) -> "Histogram":
        """At most `MAX_BINS` bins of a round width; the first that is not empty comes first."""
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


@dataclass(frozen=True)
class Overview:
    """The whole artifact; `tokens` counts each prompt once."""

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
            "completion_tokens": self.completion_tokens,
            "trained_tokens": self.trained_tokens,
            "cuts": self.counts["cuts"],
            "lengths": {histogram.name: histogram.as_json() for histogram in self.histograms},
        }
