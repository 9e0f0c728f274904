"""The sources of a configuration, each opened with the format that its first rows have.

In: the block data. Out: batches of source rows under the column names of their formats, always the same batches, and what is
said of the sources before they are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from cache.errors import DataError
from stages.data.mixing import Source, mixture, sources_of
from stages.data.readers import files_note, read_source
from stages.data.source_row import SourceRow
from stages.formats import DETECTION_ROWS, Format, arranged, conversion, detect_format, renamed
from stages.formats.labels import labels_of
from stages.formats.positions import refuse_sides_by_position
from stages.formats.unread_columns import columns_not_read
from stages.prepare.examples import ExampleMaker
from stages.prepare.filters import Filters
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.tokenization.template import Template

BATCH_ROWS = 512


@dataclass(frozen=True)
class OpenedSources:
    """The sources, with the first rows and the format of each by its name."""

    data: DataSettings
    sources: list[Source]
    heads: dict[str, list[SourceRow]]
    formats: dict[str, type[Format]]

    @classmethod
    def of(cls, data: DataSettings) -> "OpenedSources":
        """Read the first rows of each source; raises `DataError` where no format fits them."""
        sources = sources_of(data)
        heads = {source.name: head_of(source.data) for source in sources}
        formats = {source.name: choose_format(source.data, heads[source.name]) for source in sources}
        return cls(data, sources, heads, formats)

    @property
    def paths(self) -> list[str]:
        """The path of each source."""
        return [source.data.path for source in self.sources]

    @property
    def format_names(self) -> dict[str, str]:
        """The name of each source's format."""
        return {name: format_.name for name, format_ in self.formats.items()}

    def batches(self) -> Iterator[list[SourceRow]]:
        """All rows, mixed, `BATCH_ROWS` at a time."""
        streams = {
            source.name: partial(_stream, source.data, self.formats[source.name]) for source in self.sources
        }
        rows = mixture(self.sources, streams, self.data)
        while batch := list(islice(rows, BATCH_ROWS)):
            yield batch

    def maker(self, settings: PrepareSettings, template: Template, filters: Filters) -> ExampleMaker:
        """What makes examples of the batches."""
        converts = {
            source.name: conversion(
                self.formats[source.name],
                source.data,
                settings,
                renamed(self.heads[source.name], source.data.columns),
            )
            for source in self.sources
        }
        gathered = frozenset(name for name, format_ in self.formats.items() if format_.gathered_by)
        return ExampleMaker(converts, settings, template, filters, gathered)

    def notes(self, filter_: FilterSettings) -> Iterator[str]:
        """What is said of the sources; raises `DataError` where a source's columns mean nothing certain."""
        for source in self.sources:
            yield from self._notes_of(source, filter_)
        if len({format_.holds_ids for format_ in self.formats.values()}) > 1:
            yield "some sources have text and some token ids: the same prompt in both is not recognized, so it can be held out in one and trained on in the other; to avoid this, evaluate on a separate set: prepare.heldout_fraction=0 and eval.sets"

    def _notes_of(self, source: Source, filter_: FilterSettings) -> Iterator[str]:
        format_, head = self.formats[source.name], self.heads[source.name]
        note = files_note(source.data)
        if note is not None:
            yield note
        where = f"{source.name}: " if len(self.sources) > 1 else ""
        _, guessed = labels_of(format_, renamed(head, source.data.columns), source.data)
        refuse_sides_by_position(head, source.data)
        unread = columns_not_read(head, format_, source.data)
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
            yield "; ".join(parts)


def head_of(data: DataSettings) -> list[SourceRow]:
    """The first rows of a source, by which its format is chosen."""
    head = list(islice(read_source(data), DETECTION_ROWS))
    if not head:
        raise DataError(
            f"{data.path} holds no rows. Give a file with at least one preference with --set data.path=PATH."
        )
    return head


def choose_format(data: DataSettings, head: list[SourceRow]) -> type[Format]:
    """The format that is named, or that these rows have; raises `DataError`."""
    rows = list(renamed(head, data.columns))
    if all(row.value is None for row in rows):
        raise DataError(
            f"{rows[0].location}: {rows[0].problem}. None of the first {len(rows)} rows could be read."
        )
    return detect_format(data.format, rows)


def _stream(data: DataSettings, format_: type[Format]) -> Iterator[SourceRow]:
    """The rows of a source with the column names of its format, and arranged as it needs them."""
    return arranged(renamed(read_source(data), data.columns), format_)
