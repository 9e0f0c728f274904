"""Stage 1 of 4: preference data -> tokenized, masked rows in Arrow shards.

Reads `data.path` or `data.sources` with the policy's tokenizer; writes an artifact `rows/<name>-<fingerprint>`
with shards `train-*.arrow` and `heldout-*.arrow`, the chat template that wrote conversations (`chat_template.jinja`), and
`rejected.jsonl` where rows could not be used.
Its identity is the content of the sources, the tokenizer, the template and the settings. Rows in = rows kept + rows
dropped, counted by reason. Memory does not grow with the data: it holds a few batches and one shard of each split. Run it with
`align prepare`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, Draft
from cache.errors import DataError
from stages.data.columns import NOT_TEXT
from stages.data.mixing import Source, sources_identity, sources_of
from stages.data.readers import source_identity
from stages.data.rows import SPLITS
from stages.data.source_row import SourceRow
from stages.models.chat_files import CHAT_TEMPLATE
from stages.prepare.counts import RowCounts
from stages.prepare.duplicates import Duplicates
from stages.prepare.examples import ExampleMaker, Outcome
from stages.prepare.filters import Filters
from stages.prepare.rejected import kept_problems, list_rejected, listed, without_malformed
from stages.prepare.shard_writer import SplitWriter
from stages.prepare.share_files import joined, share_counts, write_share
from stages.prepare.shares import Share, find_shares
from stages.prepare.sources import OpenedSources, choose_format, head_of
from stages.prepare.workers import outcomes
from stages.runtime.context import Context
from stages.runtime.shares import choose_worker
from stages.settings.data import DataSettings, FilterSettings, PrepareSettings
from stages.settings.without_effect import effective_data, effective_filter, effective_prepare
from stages.tokenization.template import Template

STAGE_VERSION = 9
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
            if choose_format(data.model_copy(update={"format": "auto"}), head_of(data)).name == data.format:
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
    with _drafted(context, "rows", artifact_name(data), "prepare", identity) as draft:
        sources = OpenedSources.of(data)
        maker = _maker(sources, settings, template, context, filter_)
        found = outcomes(sources.batches(), maker, settings.num_workers)
        return _publish(draft, found, sources, settings, template, context, filter_)


def find_share(
    share: str,
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings = NOTHING_FILTERED,
) -> Artifact | None:
    """The share `i/N` of the rows of this configuration, if it is finished; raises `UsageError` for another text."""
    return context.store.find(*_share_of(share, data, settings, template, filter_).place)


def prepare_share(
    share: str,
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings = NOTHING_FILTERED,
) -> Artifact:
    """Make the share `i/N` of the rows: all source rows are read, and every N-th batch of them becomes examples."""
    own = _share_of(share, data, settings, template, filter_)
    kind, name, identity = own.place
    with _drafted(context, kind, name, own.stage, identity) as draft:
        sources = OpenedSources.of(data)
        maker = _maker(sources, settings, template, context, filter_)
        seen = 0

        def own_batches() -> Iterator[list[SourceRow]]:
            nonlocal seen
            for batch in sources.batches():
                if own.worker.does(seen):
                    yield batch
                seen += 1

        found = (
            without_malformed(outcome, data)
            for outcome in outcomes(own_batches(), maker, settings.num_workers)
        )
        counts = write_share(draft, found, own.worker)
        return context.store.publish(
            draft, share_counts(counts, seen), {}, context.config_text, data_paths=sources.paths
        )


def join(
    data: DataSettings,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings = NOTHING_FILTERED,
) -> Artifact:
    """Make the rows artifact of its shares: the bytes of `prepare`. Raises `StaleError` where shares are missing."""
    identity = rows_identity(data, settings, template, filter_)
    shares = find_shares(artifact_name(data), identity, context)
    with _drafted(context, "rows", artifact_name(data), "prepare", identity) as draft:
        sources = OpenedSources.of(data)
        return _publish(draft, joined(shares), sources, settings, template, context, filter_)


def _share_of(
    share: str, data: DataSettings, settings: PrepareSettings, template: Template, filter_: FilterSettings
) -> Share:
    rows = rows_identity(data, settings, template, filter_)
    return Share(artifact_name(data), rows, choose_worker(share))


@contextmanager
def _drafted(context: Context, kind: str, name: str, stage: str, identity: dict[str, Any]) -> Iterator[Draft]:
    """A draft that is thrown away unless it was published."""
    draft = context.store.draft(kind, name, stage, identity)
    try:
        yield draft
    finally:
        draft.discard()


def _maker(
    sources: OpenedSources,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings,
) -> ExampleMaker:
    """What makes examples of these sources, after saying what is to be known of them."""
    filters = Filters(filter_)
    maker = sources.maker(settings, template, filters)
    for note in (*sources.notes(filter_), *template.renderer.notes(), *filters.notes()):
        context.log(note)
    return maker


def _publish(
    draft: Draft,
    found: Iterable[Outcome],
    sources: OpenedSources,
    settings: PrepareSettings,
    template: Template,
    context: Context,
    filter_: FilterSettings,
) -> Artifact:
    """Write the outcomes of all batches and publish the rows; raises `DataError` where they cannot be used."""
    usable = (without_malformed(outcome, sources.data) for outcome in found)
    counts = _write_rows(usable, draft, settings, filter_)
    _refuse_columns_of_no_text(counts, sources.sources, draft)
    _refuse_no_training_row(counts, settings, draft)
    if counts.chat_rows and (note := template.renderer.fallback_note()):
        context.log(note)
    if counts.chat_rows:
        (draft.path / CHAT_TEMPLATE).write_text(template.renderer.published_source, encoding="utf-8")
    return context.store.publish(
        draft,
        {**counts.to_manifest(sources.format_names), "turn_end_ids": template.turn_end_ids()},
        {},
        context.config_text,
        data_paths=sources.paths,
        tokenizer=str(template.tokenizer.name_or_path),
    )


def _write_rows(
    found: Iterable[Outcome], draft: Draft, settings: PrepareSettings, filter_: FilterSettings
) -> RowCounts:
    """Write the examples that are kept; returns the counts of all rows."""
    counts, duplicates = RowCounts(), Duplicates(filter_)
    writers = {split: SplitWriter(draft, split, settings, counts) for split in SPLITS}
    for outcome in found:
        counts.add(outcome.counts)
        list_rejected(outcome.rejected, draft)
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
