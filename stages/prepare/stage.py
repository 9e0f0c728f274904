"""Stage 1 of 4: preference data -> tokenized, masked rows in Arrow shards.

Reads `data.path` or `data.sources` with the policy's tokenizer; writes an artifact `rows/<name>-<fingerprint>`
with shards `train-*.arrow` and `heldout-*.arrow`, the chat template that wrote conversations (`chat_template.jinja`), and
`rejected.jsonl` where rows could not be used.
Its identity is the content of the sources, the tokenizer, the template and the settings. Rows in = rows kept + rows
dropped, counted by reason. Memory does not grow with the data: it holds a few batches and one shard of each split. Run it with
`align prepare`.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, Draft
from cache.errors import DataError
from stages.data.columns import NOT_TEXT
from stages.data.mixing import Source, mixture, sources_identity, sources_of
from stages.data.readers import files_note, read_source, source_identity
from stages.data.rows import SPLITS
from stages.data.source_row import SourceRow
from stages.formats import DETECTION_ROWS, Format, arranged, conversion, detect_format, renamed
from stages.formats.labels import labels_of
from stages.formats.positions import refuse_sides_by_position
from stages.formats.unread_columns import columns_not_read
from stages.models.chat_files import CHAT_TEMPLATE
from stages.prepare.counts import RowCounts
from stages.prepare.duplicates import Duplicates
from stages.prepare.examples import ExampleMaker
from stages.prepare.filters import Filters
from stages.prepare.rejected import kept_problems, list_rejected, listed
from stages.prepare.shard_writer import SplitWriter
from stages.prepare.workers import outcomes
from stages.runtime.context import Context
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.settings.without_effect import effective_data, effective_filter, effective_prepare
from stages.tokenization.template import Template

STAGE_VERSION = 9
BATCH_ROWS = 512
# Settings of which the identity of the template has the effect.
PART_OF_THE_TEMPLATE = {"template", "append_eos", "thinking", "chat_template_kwargs", "system"}
NOTHING_FILTERED = FilterSettings()


def rows_identity(
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    filter_: FilterSettings = NOTHING_FILTERED,
) -> dict[str, Any]:
    """Everything that changes the rows, and nothing else."""
    data, settings, filter_ = (
        effective_data(_without_detected_formats(data)),
        effective_prepare(settings),
        effective_filter(filter_),
    )
    return {
        "stage_version": STAGE_VERSION,
        "source": sources_identity(data),
        "data": data.model_dump(
            include={"format", "columns", "labels", "ties", "threshold", "max_samples", "on_bad_row"}
            | ({"seed"} if data.sources else set())
        ),
        "prepare": settings.model_dump(exclude=PART_OF_THE_TEMPLATE | {"tokenizer", "num_workers"}),
        "filter": {
            **filter_.model_dump(exclude_defaults=True, exclude={"decontaminate"}),
            "decontaminate": [source_identity(DataSettings(path=path)) for path in filter_.decontaminate],
        },
        "template": template.identity(),
    }


def _without_detected_formats(data: DataSettings) -> DataSettings:
    """The settings with `auto` for each format that is named as it would be detected."""
    sources = [
        entry.model_copy(update={"format": _named_format(source.data)})
        for entry, source in zip(data.sources, sources_of(data), strict=False)
    ]
    return data.model_copy(update={"sources": sources, "format": "auto" if sources else _named_format(data)})


def _named_format(data: DataSettings) -> str:
    if data.format != "auto":
        try:
            if _choose_format(data.model_copy(update={"format": "auto"}), _head(data)).name == data.format:
                return "auto"
        except DataError:  # ambiguous, so the name decides
            pass
    return data.format


def artifact_name(data: DataSettings) -> str:
    """A readable name for the artifact folder, from the names of the sources."""
    paths = [source.data.path for source in sources_of(data)]
    stem = "-".join(Path(path).name.split(".")[0] for path in paths)
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem)[:40] or "rows"


def find_rows(
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings = NOTHING_FILTERED,
) -> Artifact | None:
    """The finished rows artifact of this configuration, if there is one."""
    return context.store.find("rows", artifact_name(data), rows_identity(data, settings, template, filter_))


def prepare(
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings = NOTHING_FILTERED,
) -> Artifact:
    """Make the rows artifact. Raises `DataError` when the data cannot be used, naming file and row."""
    identity = rows_identity(data, settings, template, filter_)
    draft = context.store.draft("rows", artifact_name(data), "prepare", identity)
    try:
        sources = sources_of(data)
        heads = {source.name: _head(source.data) for source in sources}
        formats = {source.name: _choose_format(source.data, heads[source.name]) for source in sources}
        converts = {
            source.name: conversion(
                formats[source.name],
                source.data,
                settings,
                renamed(heads[source.name], source.data.columns),
            )
            for source in sources
        }
        _announce(formats, sources, heads, filter_, template, context)
        gathered = frozenset(name for name, format_ in formats.items() if format_.gathered_by)
        filters = Filters(filter_)
        for note in filters.notes():
            context.log(note)
        maker = ExampleMaker(converts, settings, template, filters, gathered)
        counts = _write_rows(data, maker, sources, formats, draft)
        _refuse_columns_of_no_text(counts, sources, draft)
        _refuse_no_training_row(counts, settings, draft)
        if counts.chat_rows and (note := template.renderer.fallback_note()):
            context.log(note)
        if counts.chat_rows:
            (draft.path / CHAT_TEMPLATE).write_text(template.renderer.published_source, encoding="utf-8")
        names = {name: format_.name for name, format_ in formats.items()}
        return context.store.publish(
            draft,
            {**counts.to_manifest(names), "turn_end_ids": template.turn_end_ids()},
            {},
            context.config_text,
            data_paths=[source.data.path for source in sources],
            tokenizer=str(template.tokenizer.name_or_path),
        )
    finally:
        draft.discard()


def _write_rows(
    data: DataSettings,
    maker: ExampleMaker,
    sources: list[Source],
    formats: dict[str, type[Format]],
    draft: Draft,
) -> RowCounts:
    """Read, make and write all examples; returns the counts of all rows."""
    counts, duplicates = RowCounts(), Duplicates(maker.filters.settings)
    writers = {split: SplitWriter(draft, split, maker.settings, counts) for split in SPLITS}
    streams = {source.name: partial(_stream, source.data, formats[source.name]) for source in sources}
    batches = _batches(mixture(sources, streams, data))
    for outcome in outcomes(batches, maker, maker.settings.num_workers):
        counts.add(outcome.counts)
        list_rejected(outcome.rejected, data, draft)
        for made in outcome.examples:
            reason = duplicates.reason(made.example.example_id, made.text)
            if reason is not None:
                counts.drop(made.source, reason)
                continue
            counts.keep(made)
            writers[made.split].add(made.example)
    for writer in writers.values():
        writer.finish()
    return counts


def _batches(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _refuse_columns_of_no_text(counts: RowCounts, sources: list[Source], draft: Draft) -> None:
    """Raise `DataError` where rows without text outnumber the rows kept: then the column is not one of text."""
    for source in sources:
        dropped = counts.dropped[source.name, NOT_TEXT]
        if dropped > counts.rows_kept[source.name]:
            first = next(row for row in listed(draft) if row["reason"] == NOT_TEXT)
            raise DataError(
                f"{first['location']}: {first['problem']}; the same in {dropped:,} of {counts.rows_in[source.name]:,} rows of {source.name}. Map the columns that have text in YAML (data.columns), or convert the values to text."
            )


def _refuse_no_training_row(counts: RowCounts, settings: PrepareSettings, draft: Draft) -> None:
    if counts.examples["train"]:
        return
    if counts.examples["heldout"]:
        raise DataError(
            f"All {counts.examples['heldout']:,} examples of {' + '.join(counts.rows_in)} are held out: prepare.heldout_fraction={settings.heldout_fraction:g} is a share of the prompts, and there are few of them. Use --set prepare.heldout_fraction=0."
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.reasons().items())
    raise DataError(
        f"{' + '.join(counts.rows_in)}: no usable training row among {counts.rows_in.total()} ({reasons}).{kept_problems(draft)}"
    )


def _head(data: DataSettings) -> list[SourceRow]:
    """The first rows of a source, by which its format is chosen."""
    head = list(islice(read_source(data), DETECTION_ROWS))
    if not head:
        raise DataError(
            f"{data.path} holds no rows. Give a file with at least one preference with --set data.path=PATH."
        )
    return head


def _choose_format(data: DataSettings, head: list[SourceRow]) -> type[Format]:
    rows = list(renamed(head, data.columns))
    if all(row.value is None for row in rows):
        raise DataError(
            f"{rows[0].location}: {rows[0].problem}. None of the first {len(rows)} rows could be read."
        )
    return detect_format(data.format, rows)


def _announce(
    formats: dict[str, type[Format]],
    sources: list[Source],
    heads: dict[str, list[SourceRow]],
    filter_: FilterSettings,
    template: Template,
    context: Context,
) -> None:
    for source in sources:
        format_ = formats[source.name]
        note = files_note(source.data)
        if note is not None:
            context.log(note)
        where = f"{source.name}: " if len(sources) > 1 else ""
        _, guessed = labels_of(format_, renamed(heads[source.name], source.data.columns), source.data)
        refuse_sides_by_position(heads[source.name], source.data)
        unread = columns_not_read(heads[source.name], format_, source.data)
        unread = [
            column for column in unread if filter_.language is None or column != filter_.language_column
        ]
        parts = [f"not read: {', '.join(unread)}"] if unread else []
        if source.data.format == "auto":
            parts = [
                f"detected: {where}{format_.name} ({format_.columns})",
                *parts,
                "override with --set data.format=NAME",
            ]
        if guessed:
            parts.append(f"{guessed}; other meanings with --set data.labels")
        if parts:
            context.log("; ".join(parts))
    if len({format_.holds_ids for format_ in formats.values()}) > 1:
        context.log(
            "some sources have text and some token ids: the same prompt in both is not recognized, so it can be held out in one and trained on in the other; to avoid this, evaluate on a separate set: prepare.heldout_fraction=0 and eval.sets"
        )
    for note in template.renderer.notes():
        context.log(note)


def _stream(data: DataSettings, format_: type[Format]) -> Iterator[SourceRow]:
    """The rows of a source with the column names of its format, and arranged as it needs them."""
    return arranged(renamed(read_source(data), data.columns), format_)
