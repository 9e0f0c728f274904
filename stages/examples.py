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
from stages.cycles import compared
from stages.encoding import Encoded, Rendered
from stages.formats import Preference, Unusable
from stages.reading import BadRow, SourceRow
from stages.report import Report
from stages.rows import Example, Row
from stages.settings import PrepareSettings
from stages.templates import Template
from stages.truncation import Fitted, fit

Convert = Callable[[Mapping[str, Any]], Preference]


@dataclass(frozen=True)
class Rejected:
    """A malformed row: its place in the batch, its location and what is wrong with it."""

    place: int
    location: str
    problem: str


@dataclass
class Outcome:
    """What a batch of source rows became; `examples` are (split, example) in the order of the rows."""

    report: Report = field(default_factory=Report)
    examples: list[tuple[str, Example]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


@dataclass
class Converted:
    """A batch between rendering and tokenizing: the rows that were usable so far, and the outcome so far."""

    outcome: Outcome
    rows: list[tuple[int, SourceRow, Preference]] = field(default_factory=list)
    rendered: list[Rendered] = field(default_factory=list)


@dataclass(frozen=True)
class ExampleMaker:
    """Makes examples of batches; `converts` has the conversion of each source's format."""

    converts: Mapping[str, Convert]
    settings: PrepareSettings
    template: Template

    def make(self, rows: Sequence[SourceRow]) -> Outcome:
        """All three steps."""
        converted = self.convert(rows)
        return self.finish(converted, self.encode(converted))

    def convert(self, rows: Sequence[SourceRow]) -> Converted:
        """Source rows to rendered text."""
        batch = Converted(Outcome())
        report = batch.outcome.report
        for place, row in enumerate(rows):
            report.rows_in[row.source] += 1
            try:
                if row.value is None:
                    raise BadRow(row.problem)
                preference = self.converts[row.source](row.value)
                batch.rendered.append(self.template.render(preference))
                batch.rows.append((place, row, preference))
            except Unusable as reason:
                report.drop(row.source, str(reason))
            except BadRow as problem:
                self._reject(batch.outcome, place, row, problem)
        return batch

    def encode(self, batch: Converted) -> list[Encoded | BadRow]:
        """Rendered text to ids; nearly all of the time is the tokenizer's, outside Python's lock."""
        return self.template.encode(batch.rendered)

    def finish(self, batch: Converted, encoded: Sequence[Encoded | BadRow]) -> Outcome:
        """Ids to examples within the limits."""
        outcome = batch.outcome
        for (place, row, preference), ids in zip(batch.rows, encoded, strict=True):
            if isinstance(ids, BadRow):
                self._reject(outcome, place, row, ids)
                continue
            fitted = self._fitted(preference, ids)
            if isinstance(fitted, str):
                outcome.report.drop(row.source, fitted)
                continue
            outcome.report.keep(row.source, fitted, ids.rejoined)
            outcome.examples.append(self._example(row, preference, fitted))
        outcome.rejected.sort(key=lambda rejected: rejected.place)
        return outcome

    def _reject(self, outcome: Outcome, place: int, row: SourceRow, problem: BadRow) -> None:
        outcome.report.drop(row.source, "bad_row")
        outcome.rejected.append(Rejected(place, row.location, str(problem)))

    def _fitted(self, preference: Preference, encoded: Encoded) -> Fitted | str:
        """The example cut to the limits, or the reason why it is not used."""
        if any(_is_blank(candidate.completion) for candidate in preference.candidates):
            return "empty_completion"
        fitted = fit(encoded.prompt_ids, encoded.completions, self.settings)
        if fitted is None:
            return "prompt_too_long"
        if not all(mask.any() for _, mask in fitted.completions):
            return "nothing_left_to_train"
        pair = compared(preference.candidates, fitted.completions)
        if len(pair) == 2 and all(np.array_equal(a, b) for a, b in zip(*pair, strict=True)):
            return "identical_after_truncation"
        return fitted

    def _example(self, row: SourceRow, preference: Preference, fitted: Fitted) -> tuple[str, Example]:
        rows = [
            Row(candidate.role, ids, mask, candidate.score, cut=cut)
            for candidate, (ids, mask), cut in zip(
                preference.candidates, fitted.completions, fitted.completions_cut, strict=True
            )
        ]
        said = [preference.prompt, [[entry.role, entry.completion] for entry in preference.candidates]]
        digest = hashlib.blake2b(canonical_json(said), digest_size=12)
        example = Example(digest.hexdigest(), row.location, fitted.prompt_ids, rows, fitted.prompt_cut)
        return split_of(preference, self.settings.heldout_fraction), example


def split_of(preference: Preference, heldout_fraction: float) -> str:
    """Held out or not, by what the prompt says alone, so that a prompt never sits on both sides.

    Text is the user turn it becomes in a chat, and white space does not count, because templates trim
    it: prompts that two sources write differently and that become the same ids share a side.
    """
    prompt = preference.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = []
    for turn in turns:
        content = turn.get("content")
        text = content if isinstance(content, str) else canonical_json(content).decode()
        said += [turn["role"], " ".join(text.split())]
    digest = hashlib.sha256("\0".join(said).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64 else "train"


def _is_blank(completion: Any) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(str(turn["content"]).strip() for turn in completion if turn["role"] == "assistant")
