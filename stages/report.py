"""What became of the source rows and their tokens: counted while preparing, printed and stored after it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.rows import SPLITS, Example
from stages.truncation import Fitted


@dataclass
class Cuts:
    """How many prompts or completions were cut, and how many of them by how many tokens."""

    by_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, tokens: int) -> None:
        """Count one that lost `tokens` tokens; 0 is none."""
        if tokens:
            self.by_tokens[tokens] += 1

    def summary(self) -> dict[str, int]:
        """How many were cut, the tokens they lost in all, and the median and the largest cut."""
        if not self.by_tokens:
            return {"cut": 0, "tokens": 0, "median": 0, "max": 0}
        sizes = np.array(sorted(self.by_tokens))
        ranks = np.cumsum([self.by_tokens[int(size)] for size in sizes])
        middle = int(np.searchsorted(ranks, (ranks[-1] + 1) // 2))
        return {
            "cut": int(ranks[-1]),
            "tokens": sum(size * count for size, count in self.by_tokens.items()),
            "median": int(sizes[middle]),
            "max": int(sizes[-1]),
        }


@dataclass
class Report:
    """Counts of one batch of source rows, or of all of them together."""

    rows_in: Counter[str] = field(default_factory=Counter)
    rows_kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompts: Cuts = field(default_factory=Cuts)
    completions: Cuts = field(default_factory=Cuts)
    rejoined_at_prompt: int = 0
    examples: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    scored_rows: int = 0
    tokens: int = 0

    def drop(self, source: str, reason: str) -> None:
        """Count a row that is not used."""
        self.dropped[source, reason] += 1

    def keep(self, source: str, fitted: Fitted, rejoined: int) -> None:
        """Count a row that is used, and what was cut off it."""
        self.rows_kept[source] += 1
        self.prompts.add(fitted.prompt_cut)
        for cut in fitted.completions_cut:
            self.completions.add(cut)
        self.rejoined_at_prompt += rejoined

    def write(self, split: str, examples: list[Example]) -> None:
        """Count examples that go into a shard."""
        self.examples[split] += len(examples)
        for example in examples:
            self.rows.update(row.role for row in example.rows)
            self.scored_rows += sum(row.score is not None for row in example.rows)
            self.tokens += len(example.prompt_ids) + sum(len(row.ids) for row in example.rows)

    def add(self, other: "Report") -> None:
        """Take over the counts of a batch."""
        self.rows_in += other.rows_in
        self.rows_kept += other.rows_kept
        self.dropped += other.dropped
        self.prompts.by_tokens += other.prompts.by_tokens
        self.completions.by_tokens += other.completions.by_tokens
        self.rejoined_at_prompt += other.rejoined_at_prompt

    def reasons(self, source: str | None = None) -> dict[str, int]:
        """Dropped rows by reason, of one source or of all."""
        found: Counter[str] = Counter()
        for (name, reason), count in self.dropped.items():
            if source in (None, name):
                found[reason] += count
        return dict(sorted(found.items()))

    def counts(self, formats: dict[str, str]) -> dict[str, Any]:
        """The report as plain numbers, with rows in = kept + dropped checked for every source."""
        for source in formats:
            assert self.rows_in[source] == self.rows_kept[source] + sum(self.reasons(source).values()), (
                f"a row of {source} was neither kept nor counted as dropped"
            )
        kept = self.rows_kept.total()
        assert kept == self.examples.total(), "a row that was kept is in no shard"
        prompts, completions = self.prompts.summary(), self.completions.summary()
        return {
            "format": ", ".join(dict.fromkeys(formats.values())),
            "rows_in": self.rows_in.total(),
            "rows_kept": kept,
            "dropped": self.reasons(),
            "sources": {
                source: {
                    "format": name,
                    "rows_in": self.rows_in[source],
                    "rows_kept": self.rows_kept[source],
                    "dropped": self.reasons(source),
                }
                for source, name in formats.items()
            },
            "examples": {split: self.examples[split] for split in SPLITS},
            "rows_by_role": dict(sorted(self.rows.items())),
            "prompts_cut": prompts["cut"],
            "completions_cut": completions["cut"],
            "tokens_cut": prompts["tokens"] + completions["tokens"],
            "cuts": {"prompts": prompts, "completions": completions},
            "rejoined_at_prompt": self.rejoined_at_prompt,
            "scored_rows": self.scored_rows,
            "tokens": self.tokens,
        }
