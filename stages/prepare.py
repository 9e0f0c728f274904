"""Stage 1 of 4: preference data -> tokenized, masked rows in Arrow shards.

Reads `data.path` or `data.sources` with the policy's tokenizer; writes an artifact `rows/<name>-<fingerprint>`
with shards `train-*.arrow` and `heldout-*.arrow` (and `rejected.jsonl` where malformed rows were
skipped). Its identity is the sources' content, the tokenizer, the template and the limits; rows in
= rows kept + rows dropped, by reason. Memory does not grow with the data: what is held is the batches at
work and one shard of each split. Run it with `align prepare`.
"""

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, Draft
from cache.errors import DataError, UsageError
from stages.context import Context
from stages.cycles import SplitWriter
from stages.examples import Convert, ExampleMaker, Rejected
from stages.formats import Format, Graded, choose_format
from stages.reading import SourceRow
from stages.report import Report
from stages.rows import SPLITS
from stages.settings import DataSettings, PrepareSettings
from stages.side_by_side import outcomes
from stages.sources import read_sources, sources_identity, sources_of
from stages.templates import Template

STAGE_VERSION = 3
BATCH_ROWS = 512


def rows_identity(data: DataSettings, settings: PrepareSettings, template: Template) -> dict[str, Any]:
    """Everything that changes the rows, and nothing else."""
    return {
        "stage_version": STAGE_VERSION,
        "source": sources_identity(data),
        "data": data.model_dump(
            include={"format", "max_samples", "on_bad_row"} | ({"seed"} if data.sources else set())
        ),
        "prepare": settings.model_dump(exclude={"template", "append_eos", "tokenizer", "num_workers"}),
        "template": template.identity(),
    }


def artifact_name(data: DataSettings) -> str:
    """A readable name for the artifact folder, from the source's name."""
    paths = [source.data.path for source in sources_of(data)]
    stem = "-".join(Path(path).name.split(".")[0] for path in paths)
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
        formats, rows = _formats(data)
        maker = ExampleMaker(
            {name: _conversion(format_, name, settings) for name, format_ in formats.items()},
            settings,
            template,
        )
        report = Report()
        writers = {split: SplitWriter(draft, split, settings, report) for split in SPLITS}
        for outcome in outcomes(_batches(rows), maker, settings.num_workers):
            report.add(outcome.report)
            _list_rejected(outcome.rejected, data, draft)
            for split, example in outcome.examples:
                writers[split].add(example)
        for writer in writers.values():
            writer.finish()
        if not report.examples["train"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons().items())
            raise DataError(
                f"{' + '.join(formats)}: no usable training row among {report.rows_in.total()} ({reasons or 'the source is empty'})."
            )
        counts = {
            **report.counts({name: format_.name for name, format_ in formats.items()}),
            "turn_end_ids": template.turn_end_ids(),
        }
        return context.store.publish(
            draft,
            counts,
            {},
            context.config_text,
            data_paths=[source.data.path for source in sources_of(data)],
            tokenizer=str(template.tokenizer.name_or_path),
        )
    finally:
        draft.discard()


def _batches(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _list_rejected(rejected: list[Rejected], data: DataSettings, draft: Draft) -> None:
    """Stop at the first malformed row, or add those of a batch to rejected.jsonl."""
    if not rejected:
        return
    if data.on_bad_row == "error":
        raise DataError(
            f"{rejected[0].location}: {rejected[0].problem}. Mend the row, or skip such rows with --set data.on_bad_row=skip."
        )
    with open(draft.path / "rejected.jsonl", "a", encoding="ascii") as handle:
        for row in rejected:
            handle.write(json.dumps({"location": row.location, "problem": row.problem}) + "\n")


def _formats(data: DataSettings) -> tuple[dict[str, Format], Iterator[SourceRow]]:
    """The format of each source, from its first rows, and the rows, none of them lost."""
    rows = read_sources(data)
    head: list[SourceRow] = []
    formats: dict[str, Format] = {}
    sources = sources_of(data)
    for source in sources:
        own = [row for row in head if row.source == source.name]
        while len(own) < BATCH_ROWS and not any(row.value is not None for row in own):
            row = next(rows, None)
            if row is None:
                break
            head.append(row)
            if row.source == source.name:
                own.append(row)
        formats[source.name] = _choose_format(source.data, own)
    return formats, chain(head, rows)


def _choose_format(data: DataSettings, head: list[SourceRow]) -> Format:
    if not head:
        raise DataError(
            f"{data.path} holds no rows. Give a file with at least one preference with --set data.path=PATH."
        )
    readable = [row for row in head if row.value is not None]
    if not readable:
        raise DataError(
            f"{head[0].location}: {head[0].problem}. No row at the beginning of the file could be read."
        )
    return choose_format(data.format, readable[0].value or {}, readable[0].location)


def _conversion(format_: Format, name: str, settings: PrepareSettings) -> Convert:
    """How a source row becomes a preference; the one place where a ranked list is kept or made a pair."""
    if settings.graded == "best_worst":
        return format_.convert
    if format_ is not Graded:
        raise UsageError(
            f"prepare.graded={settings.graded} is for data of format {Graded.name} ({Graded.columns}), and {name} has format {format_.name}. Leave it out."
        )
    return Graded.rank
