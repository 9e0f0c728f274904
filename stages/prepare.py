"""Stage 1 of 4: preference data -> tokenized, masked rows in Arrow shards.

Reads `data.path` with the policy's tokenizer; writes an artifact `rows/<name>-<fingerprint>` with
shards `train-*.arrow` and `heldout-*.arrow` (and `rejected.jsonl` where malformed rows were
skipped). Its identity is the source's content, the tokenizer, the template and the limits; rows in
= rows kept + rows dropped, by reason. Run it with `align prepare`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from cache.artifacts import Artifact, Draft
from cache.errors import DataError
from cache.files import write_bytes
from cache.fingerprint import canonical_json
from stages.columns import as_messages
from stages.context import Context
from stages.formats import (
    DETECTION_ROWS,
    Candidate,
    Format,
    Preference,
    Tokens,
    Unusable,
    conversion,
    detect_format,
    gather,
    renamed,
)
from stages.pairs import best_and_worst
from stages.reading import BadRow, SourceRow, read_source, source_identity
from stages.rows import SPLITS, Example, Row, to_table
from stages.settings import DataSettings, PrepareSettings
from stages.templates import Encoded, Template
from stages.truncation import Fitted, fit

STAGE_VERSION = 3
BATCH_ROWS = 512
SHARD_EXAMPLES = 2048
# Examples whose completions rotate to make each other's mismatched rows; small, so that an optimizer
# step of any usual size holds whole cycles.
CYCLE = 4
Value = TypeVar("Value")


@dataclass
class Report:
    """What happened to the source rows and tokens."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, str]] = field(default_factory=list)
    prompts_cut: int = 0
    completions_cut: int = 0
    tokens_cut: int = 0
    rejoined_at_prompt: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    examples: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    scored_rows: int = 0
    weighted_rows: int = 0
    tokens: int = 0

    def counts(self, format_name: str) -> dict[str, Any]:
        """The report as plain numbers, with rows in = kept + dropped checked."""
        kept = sum(self.examples.values())
        assert self.rows_in == kept + sum(self.dropped.values()), (
            "a source row was neither kept nor counted as dropped"
        )
        return {
            "format": format_name,
            "rows_in": self.rows_in,
            "rows_kept": kept,
            "dropped": dict(sorted(self.dropped.items())),
            "examples": {split: self.examples[split] for split in SPLITS},
            "rows_by_role": dict(sorted(self.rows.items())),
            "prompts_cut": self.prompts_cut,
            "completions_cut": self.completions_cut,
            "tokens_cut": self.tokens_cut,
            "rejoined_at_prompt": self.rejoined_at_prompt,
            "notes": {note: count for note, count in sorted(self.notes.items()) if count},
            "kto_weights": kto_weights(self.rows["desirable"], self.rows["undesirable"]),
            "scored_rows": self.scored_rows,
            "weighted_rows": self.weighted_rows,
            "tokens": self.tokens,
        }


def rows_identity(data: DataSettings, settings: PrepareSettings, template: Template) -> dict[str, Any]:
    """Everything that changes the rows, and nothing else."""
    return {
        "stage_version": STAGE_VERSION,
        "source": source_identity(data),
        "data": data.model_dump(
            include={"format", "columns", "ties", "threshold", "max_samples", "on_bad_row"}
        ),
        "prepare": settings.model_dump(exclude={"template", "append_eos"}),
        "template": template.identity(),
    }


def artifact_name(data: DataSettings) -> str:
    """A readable name for the artifact folder, from the source's name."""
    stem = Path(data.path).name.split(".")[0]
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem)[:40] or "rows"


def find_rows(
    data: DataSettings, settings: PrepareSettings, template: Template, context: Context
) -> Artifact | None:
    """The finished rows artifact of this configuration, if there is one."""
    return context.store.find("rows", artifact_name(data), rows_identity(data, settings, template))


def prepare(data: DataSettings, settings: PrepareSettings, template: Template, context: Context) -> Artifact:
    """Make the rows artifact. Raises `DataError` when the data cannot be used, naming file and row."""
    identity = rows_identity(data, settings, template)
    draft = context.store.draft("rows", artifact_name(data), "prepare", identity)
    try:
        report = Report()
        source = renamed(read_source(data), data.columns)
        first = list(islice(source, DETECTION_ROWS))
        format_ = _choose_format(data, first)
        convert = conversion(format_, data, settings)
        _announce(format_, data, template, context)
        source = _gathered(format_, chain(first, source), report)
        head = list(islice(source, BATCH_ROWS))
        writers = {split: _SplitWriter(draft, split, settings, report) for split in SPLITS}
        while head:
            for split, example in _examples(head, convert, data, settings, template, report):
                writers[split].add(example)
            head = list(islice(source, BATCH_ROWS))
        for writer in writers.values():
            writer.finish()
        if not report.examples["train"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.dropped.items()))
            raise DataError(
                f"{data.path}: no usable training row among {report.rows_in} ({reasons or 'the source is empty'})."
            )
        if report.rejected:
            lines = "".join(json.dumps(entry, ensure_ascii=True) + "\n" for entry in report.rejected)
            write_bytes(draft.path / "rejected.jsonl", lines.encode())
        counts = {**report.counts(format_.name), "turn_end_ids": template.turn_end_ids()}
        return context.store.publish(draft, counts, {}, context.config_text, data_path=data.path)
    finally:
        draft.discard()


def _choose_format(data: DataSettings, head: list[SourceRow]) -> type[Format]:
    if not head:
        raise DataError(
            f"{data.path} holds no rows. Give a file with at least one preference with --set data.path=PATH."
        )
    readable = [row for row in head if row.value is not None]
    if not readable:
        raise DataError(
            f"{head[0].location}: {head[0].problem}. No row at the beginning of the file could be read."
        )
    return detect_format(data.format, head)


def _announce(format_: type[Format], data: DataSettings, template: Template, context: Context) -> None:
    if data.format == "auto":
        context.say(f"detected: {format_.name} ({format_.columns}); override with --set data.format=NAME")
    for note in template.notes():
        context.say(note)


def _gathered(format_: type[Format], rows: Iterator[SourceRow], report: Report) -> Iterator[SourceRow]:
    """The rows of the format: the source's own, or lists made of those that share a prompt."""
    if format_.gathered_by is None:
        return rows

    def counted() -> Iterator[SourceRow]:
        for row in rows:
            report.notes["rows_gathered_into_lists"] += 1
            yield row

    return gather(counted(), format_.gathered_by)


def kto_weights(desirable: int, undesirable: int) -> dict[str, list[float]] | None:
    """Suggested KTO weights for unbalanced feedback: the range of one weight, the other staying 1.

    They bring desirable_weight n_D / (undesirable_weight n_U) into [1, 4/3] (KTO, 2402.01306, section 4.2).
    None where the counts are in it already, or one of them is 0.
    """
    if not desirable or not undesirable or 1 <= desirable / undesirable <= 4 / 3:
        return None
    if desirable < undesirable:
        ratio = undesirable / desirable
        return {"desirable_weight": [round(ratio, 2), round(ratio * 4 / 3, 2)]}
    ratio = desirable / undesirable
    return {"undesirable_weight": [round(ratio * 3 / 4, 2), round(ratio, 2)]}


def _examples(
    rows: list[SourceRow],
    convert: Callable[[Any], Preference],
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    report: Report,
) -> Iterator[tuple[str, Example]]:
    """The usable examples of a batch of source rows, with their split; everything else is counted."""
    converted: list[tuple[SourceRow, Preference]] = []
    rendered = []
    for row in rows:
        report.rows_in += 1
        try:
            if row.value is None:
                raise BadRow(row.problem)
            preference = convert(row.value)
            rendered.append(template.render(preference))
            report.notes.update(f"{name}_not_in_template" for name in rendered[-1].unused)
            converted.append((row, preference))
        except Unusable as reason:
            report.dropped[str(reason)] += 1
        except BadRow as problem:
            _reject(row, str(problem), data, report)
    for (row, preference), encoded in zip(converted, template.encode(rendered), strict=True):
        if isinstance(encoded, BadRow):
            _reject(row, str(encoded), data, report)
            continue
        fitted = _usable(preference, encoded, settings, report)
        if fitted is not None:
            yield _split_of(preference, settings), _example(row, preference, fitted)


def _reject(row: SourceRow, problem: str, data: DataSettings, report: Report) -> None:
    if data.on_bad_row == "error":
        raise DataError(
            f"{row.location}: {problem}. Mend the row, or skip such rows with --set data.on_bad_row=skip."
        )
    report.dropped["bad_row"] += 1
    report.rejected.append({"location": row.location, "problem": problem})


def _usable(
    preference: Preference, encoded: Encoded, settings: PrepareSettings, report: Report
) -> Fitted | None:
    """The example cut to the limits, or None with the reason counted."""
    empty = [_is_blank(candidate.completion) for candidate in preference.candidates]
    if any(empty):
        report.dropped["empty_completion"] += 1
        return None
    fitted = fit(encoded.prompt_ids, encoded.completions, settings)
    if fitted is None:
        report.dropped["prompt_too_long"] += 1
        return None
    if not all(mask.any() for _, mask in fitted.completions):
        report.dropped["nothing_left_to_train"] += 1
        return None
    compared = _compared(preference.candidates, fitted.completions)
    if len(compared) == 2 and all(a.tolist() == b.tolist() for a, b in zip(*compared, strict=True)):
        was_cut = fitted.prompt_cut or any(fitted.completions_cut)
        report.dropped["identical_after_truncation" if was_cut else "identical_tokens"] += 1
        return None
    report.prompts_cut += fitted.prompt_cut > 0
    report.completions_cut += sum(cut > 0 for cut in fitted.completions_cut)
    report.tokens_cut += fitted.prompt_cut + sum(fitted.completions_cut)
    report.rejoined_at_prompt += encoded.rejoined
    report.notes["characters_lost_by_the_tokenizer"] += encoded.loses_text
    return fitted


def _compared(entries: Sequence[Candidate] | Sequence[Row], values: Sequence[Value]) -> Sequence[Value]:
    """The values of the best and the worst entry of a ranked list; of other examples one, or a pair (a tie has it twice)."""
    scores = [entry.score for entry in entries if entry.role == "ranked" and entry.score is not None]
    return [values[place] for place in best_and_worst(scores)] if scores else values[:2]


def _is_blank(completion: Any) -> bool:
    if isinstance(completion, Tokens):
        return not completion.ids
    contents = (
        [completion]
        if isinstance(completion, str)
        else [
            str(m["content"]) + str(m.get("tool_calls", "")) for m in completion if m["role"] == "assistant"
        ]
    )
    return not any(content.strip() for content in contents)


def _split_of(preference: Preference, settings: PrepareSettings) -> str:
    """Held out or not, by the prompt's text alone, so that a prompt never sits on both sides."""
    prompt = preference.prompt
    # A prompt is the same one as a text and as a conversation of one turn.
    said = prompt.ids if isinstance(prompt, Tokens) else as_messages(prompt, "user")
    digest = hashlib.sha256(canonical_json(said)).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < settings.heldout_fraction * 2**64 else "train"


def _example(row: SourceRow, preference: Preference, fitted: Fitted) -> Example:
    rows = [
        Row(candidate.role, ids, mask, candidate.score, candidate.weight)
        for candidate, (ids, mask) in zip(preference.candidates, fitted.completions, strict=True)
    ]
    digest = hashlib.blake2b(canonical_json(_content(preference.prompt)), digest_size=12)
    for candidate in preference.candidates:
        digest.update(canonical_json([candidate.role, _content(candidate.completion)]))
    if preference.tools:
        digest.update(canonical_json(preference.tools))
    return Example(digest.hexdigest(), row.location, fitted.prompt_ids, rows)


def _content(value: Any) -> Any:
    return value.ids if isinstance(value, Tokens) else value


class _SplitWriter:
    """Collects examples of one split into cycles, adds their mismatched rows, and writes shards."""

    def __init__(self, draft: Draft, split: str, settings: PrepareSettings, report: Report) -> None:
        self.draft, self.split, self.settings, self.report = draft, split, settings, report
        self.pending: list[Example] = []
        self.done: list[Example] = []
        self.cycles: list[int] = []
        self.num_cycles = 0
        self.num_shards = 0

    def add(self, example: Example) -> None:
        """Take the next example; a cycle closes once two are in hand (so that none is left alone)."""
        self.pending.append(example)
        if len(self.pending) == 2 * CYCLE:
            self._close(self.pending[:CYCLE])
            del self.pending[:CYCLE]

    def finish(self) -> None:
        """Close what is left and write the last shard."""
        middle = CYCLE if len(self.pending) >= CYCLE + 2 else len(self.pending)
        for cycle in (self.pending[:middle], self.pending[middle:]):
            if cycle:
                self._close(cycle)
        self._write()

    def _close(self, cycle: list[Example]) -> None:
        if self.settings.mismatched:
            self._add_mismatched(cycle)
        self.done += cycle
        self.cycles += [self.num_cycles] * len(cycle)
        self.num_cycles += 1
        if len(self.done) >= SHARD_EXAMPLES:
            self._write()

    def _add_mismatched(self, cycle: list[Example]) -> None:
        """Give each example the completions of another one in the cycle, one with another prompt.

        A ranked list gives its best and its worst, as a pair does.
        """
        prompts = [example.prompt_ids.tolist() for example in cycle]
        matched = [list(_compared(example.rows, example.rows)) for example in cycle]
        for index, donor in enumerate(_donors(prompts)):
            if donor is None:
                continue
            example = cycle[index]
            room = self.settings.max_length - len(example.prompt_ids)
            example.rows += [
                Row("mismatched", row.ids[:room], row.mask[:room])
                for row in matched[donor]
                if row.mask[:room].any()
            ]

    def _write(self) -> None:
        if not self.done:
            return
        self.report.examples[self.split] += len(self.done)
        self.report.rows.update(row.role for example in self.done for row in example.rows)
        self.report.weighted_rows += sum(row.weight != 1 for example in self.done for row in example.rows)
        self.report.scored_rows += sum(row.score is not None for example in self.done for row in example.rows)
        self.report.tokens += sum(
            len(example.prompt_ids) + sum(len(row.ids) for row in example.rows) for example in self.done
        )
        self.draft.write_shard(f"{self.split}-{self.num_shards:05d}.arrow", to_table(self.done, self.cycles))
        self.num_shards += 1
        self.done, self.cycles = [], []


def _donors(prompts: Sequence[Any]) -> list[int | None]:
    """For each example of a cycle, the one whose completions are its mismatched rows.

    The next one, or, where neighbours share a prompt, the nearest rotation in which none meets its own,
    so that every completion serves once. Where no rotation does, whichever comes next with another prompt.
    """
    count = len(prompts)
    for step in range(1, count):
        donors = [(index + step) % count for index in range(count)]
        if all(prompts[index] != prompts[donor] for index, donor in enumerate(donors)):
            return list(donors)
    others = [
        [
            (index + step) % count
            for step in range(1, count)
            if prompts[(index + step) % count] != prompts[index]
        ]
        for index in range(count)
    ]
    return [found[0] if found else None for found in others]
