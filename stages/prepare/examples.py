"""Source rows to examples, a batch at a time: convert, render, tokenize, cut; whatever is not used is counted.

In: `SourceRow`s. Out: an `Outcome`: examples with their split, and what happened to every other row.
A batch depends on nothing but its rows, so that batches can be worked on side by side.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache.fingerprint import canonical_json
from stages.data.messages import as_messages
from stages.data.rows import Example, Row
from stages.data.source_row import BadRow, Flagged, SourceRow
from stages.formats import Preference, Tokens, Unusable
from stages.prepare.counts import Made, Report
from stages.prepare.filters import Filters, texts_of
from stages.prepare.shard_writer import compared
from stages.prepare.truncation import Fitted, fit
from stages.settings.data import PrepareSettings
from stages.tokenization.encode import Encoded, TextBatch, Tokenized
from stages.tokenization.template import Template

BAD_ROW = "bad_row"
Convert = Callable[[Mapping[str, Any]], Preference]


@dataclass(frozen=True)
class Rejected:
    """A row that could not be used: its place in the batch, its location, what is wrong and the reason it is counted under."""

    place: int
    location: str
    problem: str
    reason: str


@dataclass
class Outcome:
    """What a batch of source rows became, in the order of the rows."""

    report: Report = field(default_factory=Report)
    made: list[Made] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True)
class Converted:
    """A batch between rendering and tokenizing: the outcome so far, and the rows that are still in use with their texts.

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
        converted = self.convert(rows)
        return self.finish(converted, self.template.encoder.tokenize(converted.texts.texts))

    def convert(self, rows: Sequence[SourceRow]) -> Converted:
        """Source rows to rendered text."""
        outcome, usable, texts = Outcome(), [], []
        report, renderer = outcome.report, self.template.renderer
        with renderer.chat.one_timer():
            for place, row in enumerate(rows):
                report.rows_in[row.source] += 1
                if row.source in self.gathered and row.value is not None:
                    report.notes["rows_gathered_into_lists"] += len(row.value["rows"])
                try:
                    if row.value is None:
                        raise BadRow(row.problem)
                    preference = self.converts[row.source](row.value)
                    if reason := self.filters.before_rendering(row.value, preference):
                        raise Unusable(reason)
                    rendered = renderer.render(preference)
                    report.notes.update(f"{name}_not_in_template" for name in rendered.unused_keys)
                    texts.append(rendered)
                    usable.append((place, row, preference))
                except Unusable as reason:
                    report.drop(row.source, str(reason))
                except BadRow as problem:
                    self._reject(outcome, place, row, problem)
        return Converted(outcome, usable, self.template.encoder.texts_of(texts))

    def finish(self, batch: Converted, tokenized: Tokenized) -> Outcome:
        """Ids to examples within the limits."""
        outcome = batch.outcome
        encoded = self.template.encoder.encoded(batch.texts, tokenized)
        for (place, row, preference), ids in zip(batch.rows, encoded, strict=True):
            if isinstance(ids, BadRow):
                self._reject(outcome, place, row, ids)
                continue
            fitted = self._fitted(preference, ids)
            if isinstance(fitted, str):
                outcome.report.drop(row.source, fitted)
                continue
            outcome.made.append(self._made(row, preference, ids, fitted))
        outcome.rejected.sort(key=lambda rejected: rejected.place)
        return outcome

    def _reject(self, outcome: Outcome, place: int, row: SourceRow, problem: BadRow) -> None:
        reason = problem.reason if isinstance(problem, Flagged) else BAD_ROW
        outcome.report.drop(row.source, reason)
        outcome.rejected.append(Rejected(place, row.location, str(problem), reason))

    def _fitted(self, preference: Preference, encoded: Encoded) -> Fitted | str:
        """The example cut to the limits, or the reason why it is not used."""
        if any(_is_blank(candidate.completion) for candidate in preference.candidates):
            return "empty_completion"
        if reason := self.filters.after_encoding(encoded):
            return reason
        fitted = fit(encoded.prompt_ids, encoded.completions, self.settings)
        if fitted is None:
            return "prompt_too_long"
        if not all(mask.any() for _, mask in fitted.completions):
            return "nothing_left_to_train"
        pair = compared(preference.candidates, fitted.completions)
        if len(pair) == 2 and all(np.array_equal(a, b) for a, b in zip(*pair, strict=True)):
            was_cut = fitted.prompt_cut or any(fitted.completions_cut)
            return "identical_after_truncation" if was_cut else "identical_tokens"
        return fitted

    def _made(self, row: SourceRow, preference: Preference, encoded: Encoded, fitted: Fitted) -> Made:
        # Copies, because a view would keep the ids of the whole batch until its shard is full.
        rows = [
            Row(candidate.role, ids.copy(), mask.copy(), candidate.score, candidate.weight, cut)
            for candidate, (ids, mask), cut in zip(
                preference.candidates, fitted.completions, fitted.completions_cut, strict=True
            )
        ]
        said = [
            _content(preference.prompt),
            [[entry.role, _content(entry.completion)] for entry in preference.candidates],
            preference.tools or [],
        ]
        digest = hashlib.blake2b(canonical_json(said), digest_size=12)
        example = Example(digest.hexdigest(), row.location, fitted.prompt_ids.copy(), rows, fitted.prompt_cut)
        is_compared = self.filters.settings.duplicates == "near"
        return Made(
            split_of(preference, self.settings.heldout_fraction),
            row.source,
            example,
            encoded.num_merged,
            encoded.loses_characters,
            "\n".join(texts_of(preference)) if is_compared else "",
        )


def split_of(preference: Preference, heldout_fraction: float) -> str:
    """Held out or not, by what the prompt says alone, so that a prompt never sits on both sides.

    Text is the user turn it becomes in a chat, and white space does not count, because templates trim
    it: prompts that two sources write differently and that become the same ids share a side.
    """
    digest = hashlib.sha256("\0".join(prompt_texts(preference.prompt)).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64 else "train"


def prompt_texts(prompt: Any) -> list[str]:
    """Roles and texts of a prompt in turn, white space evened out; token ids as they are."""
    if isinstance(prompt, Tokens):
        return ["ids", canonical_json(prompt.ids).decode()]
    said: list[str] = []
    for turn in as_messages(prompt, "user"):
        said += [turn["role"], " ".join(str(turn["content"]).split())]
    return said


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
