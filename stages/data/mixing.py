"""Source rows from one source, or from several mixed by weights or counts, always the same rows in the same order.

A `count` is the number of rows taken from its source. Weights are relative to each other: the mixture is as large as it
can be without repeating a row. Both count source rows, before any is dropped. The rows are a random subsample by
`data.seed` and the source's name; they stay in their order, and sources alternate in proportion, so that every part of
the mixture is mixed.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cache.errors import DataError, UsageError
from stages.data.readers import source_identity
from stages.data.source_row import SourceRow
from stages.settings.data import DataSettings, SourceSettings

Stream = Callable[[], Iterator[SourceRow]]


@dataclass(frozen=True)
class Source:
    """One source: its name in counts and in the source column, its settings, and its share of the mixture."""

    name: str
    data: DataSettings
    weight: float | None = None
    count: int | None = None


def sources_of(data: DataSettings) -> list[Source]:
    """The sources of a configuration; raises `UsageError` when two have the same name, or one a weight and a count."""
    if not data.sources:
        return [Source(Path(data.path).name or data.path, data)]
    if data.path != DataSettings().path:
        raise UsageError("data.path and data.sources are both set. Give one of them.")
    found = [_source(entry, data) for entry in data.sources]
    names = [source.name for source in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(
            f"data.sources: two sources have the name {double!r}. Give them different names with name:."
        )
    both = next((source.name for source in found if source.weight and source.count), None)
    if both is not None:
        raise UsageError(f"data.sources: {both} has a weight and a count. Give one of them.")
    return found


def sources_identity(data: DataSettings) -> Any:
    """What identifies the rows that are read: the content of the only source, or of several with their shares."""
    if not data.sources:
        return source_identity(data)
    return [
        {
            "name": source.name,
            "format": source.data.format,
            "columns": source.data.columns,
            "labels": source.data.labels,
            "weight": source.weight,
            "count": source.count,
            "content": source_identity(source.data),
        }
        for source in sources_of(data)
    ]


def mixture(sources: list[Source], streams: Mapping[str, Stream], data: DataSettings) -> Iterator[SourceRow]:
    """The rows of the only source, or of several by their shares; `streams` opens each source by its name."""
    if not data.sources:
        [source] = sources
        return (replace(row, source=source.name) for row in streams[source.name]())
    return islice(_mixed(sources, streams, data.seed), data.max_samples)


def _source(entry: SourceSettings, data: DataSettings) -> Source:
    own = entry.model_dump(
        include={"path", "format", "columns", "ignore", "labels", "config", "split", "revision"}
    )
    settings = data.model_copy(update={**own, "sources": [], "max_samples": None})
    name = entry.name or Path(entry.path).name.split(".")[0] or entry.path
    return Source(name, settings, entry.weight, entry.count)


def _mixed(sources: list[Source], streams: Mapping[str, Stream], seed: int) -> Iterator[SourceRow]:
    sizes = [sum(1 for _ in streams[source.name]()) for source in sources]
    taken = _shares(sources, sizes)
    rows = [
        _sample(streams[source.name](), size, share, random.Random(f"{seed}:{source.name}"))
        for source, size, share in zip(sources, sizes, taken, strict=True)
    ]
    given = [0] * len(sources)
    for _ in range(sum(taken)):
        # The source that is furthest behind its share.
        behind = min(
            (index for index in range(len(sources)) if given[index] < taken[index]),
            key=lambda index: (given[index] + 0.5) / taken[index],
        )
        given[behind] += 1
        name, row = sources[behind].name, next(rows[behind])
        yield replace(row, source=name, location=f"{name}/{row.location}")


def _shares(sources: list[Source], sizes: list[int]) -> list[int]:
    """How many rows of each source are taken."""
    for source, size in zip(sources, sizes, strict=True):
        if not size:
            raise DataError(
                f"data.sources: {source.data.path} holds no rows. Leave it out or give another path."
            )
        if source.count and source.count > size:
            raise DataError(
                f"data.sources: {source.name} has {size:,} rows, fewer than its count of {source.count:,}, and rows are not repeated. Lower the count."
            )
    per_weight = min(
        (size / source.weight for source, size in zip(sources, sizes, strict=True) if source.weight),
        default=0,
    )
    return [
        source.count or (min(size, round(per_weight * source.weight)) if source.weight else size)
        for source, size in zip(sources, sizes, strict=True)
    ]


def _sample(rows: Iterator[SourceRow], size: int, wanted: int, choice: random.Random) -> Iterator[SourceRow]:
    """Exactly `wanted` of `size` rows in order, every subset equally likely (Knuth, volume 2, 3.4.2, algorithm S)."""
    taken = 0
    for number, row in enumerate(rows):
        if taken == wanted:
            return
        if choice.random() * (size - number) < wanted - taken:
            taken += 1
            yield row
