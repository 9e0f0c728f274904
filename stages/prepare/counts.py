"""What became of the source rows and their tokens: counted while preparing, printed and stored in the manifest after it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stages.data.rows import SPLITS, Example
from stages.engine.shared_tokens import in_units, shared_tokens


@dataclass(frozen=True)
class MadeExample:
    """The example of a usable row; whether it is kept depends on the rows before it.

    `text` is what near duplicates are found by, "" where they are kept. `num_merged` and `loses_characters` are those of
    `encode.Encoded`.
    """

    split: str
    source: str
    example: Example
    num_merged: int
    loses_characters: bool
    text: str


@dataclass(frozen=True)
class CutSummary:
    """How many prompts or completions were cut, the tokens they lost together, and the median and largest loss."""

    cut: int = 0
    tokens: int = 0
    median: int = 0
    max: int = 0


@dataclass
class Cuts:
    """How many prompts or completions were cut by how many tokens."""

    by_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, tokens: int) -> None:
        """Count one that lost `tokens` tokens; 0 is not a cut."""
        if tokens:
            self.by_tokens[tokens] += 1

    def summary(self) -> CutSummary:
        """The counts in four numbers."""
        if not self.by_tokens:
            return CutSummary()
        sizes = np.array(sorted(self.by_tokens))
        ranks = np.cumsum([self.by_tokens[int(size)] for size in sizes])
        middle = int(np.searchsorted(ranks, (ranks[-1] + 1) // 2))
        tokens = sum(size * count for size, count in self.by_tokens.items())
        return CutSummary(int(ranks[-1]), tokens, int(sizes[middle]), int(sizes[-1]))


@dataclass
class RowCounts:
    """Counts of one batch of source rows, or of all of them together."""

    rows_in: Counter[str] = field(default_factory=Counter)
    rows_kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompts: Cuts = field(default_factory=Cuts)
    completions: Cuts = field(default_factory=Cuts)
    num_merged: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    examples: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    scored_rows: int = 0
    weighted_rows: int = 0
    chat_rows: int = 0
    tokens: int = 0
    tokens_apart: int = 0
    tokens_of_tree: int = 0

    def drop(self, source: str, reason: str) -> None:
        """Count a row that is not used."""
        self.dropped[source, reason] += 1

    def keep(self, made: MadeExample) -> None:
        """Count a row that is used, and the tokens it lost."""
        self.rows_kept[made.source] += 1
        self.prompts.add(made.example.prompt_cut)
        for row in made.example.rows:
            self.completions.add(row.cut)
        self.num_merged += made.num_merged
        self.notes["characters_lost_by_the_tokenizer"] += made.loses_characters

    def write(self, split: str, examples: Sequence[Example]) -> None:
        """Count examples that go into a shard."""
        self.examples[split] += len(examples)
        for unit in in_units([example.prompt_ids for example in examples]):
            shared = shared_tokens(
                [(examples[number].prompt_ids, [row.ids for row in examples[number].rows]) for number in unit]
            )
            self.tokens_apart += shared.apart
            self.tokens += shared.prompt_once
            self.tokens_of_tree += shared.tree
        for example in examples:
            self.rows.update(row.role for row in example.rows)
            self.weighted_rows += sum(row.weight != 1 for row in example.rows)
            self.scored_rows += sum(row.score is not None for row in example.rows)

    def add(self, batch: "RowCounts") -> None:
        """Add the counts of a batch, whose examples have not been kept or written yet."""
        self.rows_in += batch.rows_in
        self.dropped += batch.dropped
        self.notes += batch.notes
        self.chat_rows += batch.chat_rows

    def reasons(self, source: str | None = None) -> dict[str, int]:
        """Dropped rows by reason, of one source or of all."""
        found: Counter[str] = Counter()
        for (name, reason), count in self.dropped.items():
            if source in (None, name):
                found[reason] += count
        return dict(sorted(found.items()))

    def to_manifest(self, formats: Mapping[str, str]) -> dict[str, Any]:
        """The counts as the manifest has them; `formats` is the format of each source.

        Checks for every source that rows in = rows kept + rows dropped.
        """
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
            "sources": {source: self._of_source(source, format_) for source, format_ in formats.items()},
            "examples": {split: self.examples[split] for split in SPLITS},
            "rows_by_role": dict(sorted(self.rows.items())),
            "prompts_cut": prompts.cut,
            "completions_cut": completions.cut,
            "tokens_cut": prompts.tokens + completions.tokens,
            "cuts": {"prompts": asdict(prompts), "completions": asdict(completions)},
            "rejoined_at_prompt": self.num_merged,
            "notes": {note: count for note, count in sorted(self.notes.items()) if count},
            "kto_weights": kto_weights(self.rows["desirable"], self.rows["undesirable"]),
            "scored_rows": self.scored_rows,
            "weighted_rows": self.weighted_rows,
            "tokens": self.tokens,
            "tokens_without_sharing": self.tokens_apart,
            "tokens_of_tree": self.tokens_of_tree,
        }

    def _of_source(self, source: str, format_: str) -> dict[str, Any]:
        return {
            "format": format_,
            "rows_in": self.rows_in[source],
            "rows_kept": self.rows_kept[source],
            "dropped": self.reasons(source),
        }


def kto_weights(desirable: int, undesirable: int) -> dict[str, list[float]] | None:
    """Suggested KTO weights for unbalanced feedback: the range of one weight while the other stays 1.

    They bring desirable_weight n_D / (undesirable_weight n_U) into [1, 4/3] (KTO, 2402.01306, section 4.2).
    None where the ratio is in this range already, or one of the counts is 0.
    """
    if not desirable or not undesirable or 1 <= desirable / undesirable <= 4 / 3:
        return None
    if desirable < undesirable:
        ratio = undesirable / desirable
        return {"desirable_weight": [round(ratio, 2), round(ratio * 4 / 3, 2)]}
    ratio = desirable / undesirable
    return {"undesirable_weight": [round(ratio * 3 / 4, 2), round(ratio, 2)]}
