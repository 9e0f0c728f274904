"""Source rows to examples, a batch at a time: convert, render, tokenize, truncate; every row that is not used is counted.

In: `SourceRow`s. Out: an `Outcome`: examples with their split, and what happened to every other row. The outcome of a
batch depends on its rows alone, so that batches can be worked on side by side.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache.fingerprint import canonical_json
from stages.data.rows import Example, Row
from stages.data.source_row import BadRow, Flagged, SourceRow
from stages.formats import Preference, Tokens, Unusable
from stages.prepare.counts import MadeExample, RowCounts
from stages.prepare.filters import Filters, texts_of
from stages.prepare.heldout import split_of
from stages.prepare.mismatched import compared
from stages.prepare.truncation import Truncated, truncate
from stages.settings.data import PrepareSettings
from stages.tokenization.encode import Encoded, TextBatch, Tokenized
from stages.tokenization.template import Template

BAD_ROW = "bad_row"
Convert = Callable[[Mapping[str, Any]], Preference]


@dataclass(frozen=True)
class RejectedRow:
    """A row that could not be used: its place in the batch, its location, the problem, and the reason it is counted under."""

    place: int
    location: str
    problem: str
    reason: str


@dataclass
class Outcome:
    """What a batch of source rows became, in the order of the rows."""

    counts: RowCounts = field(default_factory=RowCounts)
    examples: list[MadeExample] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)

    def reject(self, place: int, row: SourceRow, problem: BadRow) -> None:
        """Count and list a row that could not be used."""
        reason = problem.reason if isinstance(problem, Flagged) else BAD_ROW
        self.counts.drop(row.source, reason)
        self.rejected.append(RejectedRow(place, row.location, str(problem), reason))


@dataclass(frozen=True)
class ConvertedBatch:
    """A batch between rendering and tokenizing: the outcome so far, and the rows still in use with their texts.

    Each row comes with its place in the batch.
    """

    outcome: Outcome
    rows: list[tuple[int, SourceRow, Preference]]
    texts: TextBatch


@dataclass(frozen=True)
class ExampleMaker:
    """Makes examples of batches; `converts` has the conversion of each source's format.

    The rows of the sources in `gathered` are lists of source rows that share a prompt.
    """

    converts: Mapping[str, Convert]
    settings: PrepareSettings
    template: Template
    filters: Filters
    gathered: frozenset[str] = frozenset()

    def make(self, rows: Sequence[SourceRow]) -> Outcome:
        """Both steps, with the tokenizer's work between them."""
        batch = self.convert(rows)
        return self.finish(batch, self.template.encoder.tokenize(batch.texts.texts))

    def convert(self, rows: Sequence[SourceRow]) -> ConvertedBatch:
        """First step: source rows to rendered text."""
        outcome, usable, rendered = Outcome(), [], []
        with self.template.renderer.chat.guarded():
            for place, row in enumerate(rows):
                self._count(row, outcome.counts)
                try:
                    if row.value is None:
                        raise BadRow(row.problem)
                    preference = self.converts[row.source](row.value)
                    self.filters.check_content(row.value, preference)
                    text = self.template.renderer.render(preference)
                except Unusable as reason:
                    outcome.counts.drop(row.source, str(reason))
                except BadRow as problem:
                    outcome.reject(place, row, problem)
                else:
                    outcome.counts.chat_rows += not text.is_plain and text.pretokenized is None
                    outcome.counts.notes.update(text.notes)
                    rendered.append(text)
                    usable.append((place, row, preference))
        return ConvertedBatch(outcome, usable, self.template.encoder.texts_of(rendered))

    def finish(self, batch: ConvertedBatch, tokenized: Tokenized) -> Outcome:
        """Second step: ids to examples within the limits."""
        outcome = batch.outcome
        encoded = self.template.encoder.encoded(batch.texts, tokenized)
        for (place, row, preference), ids in zip(batch.rows, encoded, strict=True):
            try:
                if isinstance(ids, BadRow):
                    raise ids
                outcome.examples.append(self._example(row, preference, ids))
            except Unusable as reason:
                outcome.counts.drop(row.source, str(reason))
            except BadRow as problem:
                outcome.reject(place, row, problem)
        outcome.rejected.sort(key=lambda rejected: rejected.place)
        return outcome

    def _count(self, row: SourceRow, counts: RowCounts) -> None:
        counts.rows_in[row.source] += 1
        if row.source in self.gathered and row.value is not None:
            counts.notes["rows_gathered_into_lists"] += len(row.value["rows"])

    def _example(self, row: SourceRow, preference: Preference, encoded: Encoded) -> MadeExample:
        """The example of a row, within the limits; raises `Unusable`."""
        truncated = self._truncated(preference, encoded)
        # Copies, because a view would keep the ids of the whole batch until its shard is full.
        rows = [
            Row(candidate.role, ids.copy(), mask.copy(), candidate.score, candidate.weight, cut)
            for candidate, (ids, mask), cut in zip(
                preference.candidates, truncated.completions, truncated.completions_cut, strict=True
            )
        ]
        prompt_ids = truncated.prompt_ids.copy()
        example = Example(_id_of(preference), row.location, prompt_ids, rows, truncated.prompt_cut)
        is_compared = self.filters.settings.duplicates == "near"
        return MadeExample(
            split_of(preference, self.settings.heldout_fraction),
            row.source,
            example,
            encoded.num_merged,
            encoded.loses_characters,
            "\n".join(texts_of(preference)) if is_compared else "",
        )

    def _truncated(self, preference: Preference, encoded: Encoded) -> Truncated:
        """The ids cut to the limits; raises `Unusable` where nothing that can be trained on is left."""
        if any(_is_blank(candidate.completion) for candidate in preference.candidates):
            raise Unusable("empty_completion")
        self.filters.check_lengths(encoded)
        truncated = truncate(encoded.prompt_ids, encoded.completions, self.settings)
        if truncated is None:
            raise Unusable("prompt_too_long")
        if not all(mask.any() for _, mask in truncated.completions):
            raise Unusable("nothing_left_to_train")
        pair = compared(preference.candidates, truncated.completions)
        if len(pair) == 2 and all(np.array_equal(a, b) for a, b in zip(*pair, strict=True)):
            was_cut = truncated.prompt_cut or any(truncated.completions_cut)
            raise Unusable("identical_after_truncation" if was_cut else "identical_tokens")
        return truncated


def _id_of(preference: Preference) -> str:
    """Hex digest of the prompt, the completions with their roles, the tools and the template's arguments: equal content has an equal id."""
    content = [
        _content(preference.prompt),
        [[entry.role, _content(entry.completion)] for entry in preference.candidates],
        preference.tools or [],
        *([preference.chat_template_kwargs] if preference.chat_template_kwargs else []),
    ]
    return hashlib.blake2b(canonical_json(content), digest_size=12).hexdigest()


def _content(value: Any) -> Any:
    return value.ids if isinstance(value, Tokens) else value


def _is_blank(completion: Any) -> bool:
    if isinstance(completion, Tokens):
        return not completion.ids
    if isinstance(completion, str):
        return not completion.strip()
    return not any(
        turn["role"] == "assistant" and (turn["content"].strip() or turn.get("tool_calls"))
        for turn in completion
    )
