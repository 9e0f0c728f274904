"""Stage 2 of 4: rows -> reference log-probs, one float32 for every completion token.

Loads the frozen reference once, scores only the rows that no earlier run scored, and appends a shard for each unit of
work (`work_units.py`) to `ref-logps/<reference>-<fingerprint>`. A killed run loses at most the unit in hand and the
one being written meanwhile, and a resumed run writes the bytes that an uninterrupted one would. Under `torchrun`, or
as independent jobs with `--shard 1/8` ... `--shard 8/8`, each process scores its own units. Run it with
`align cache-ref`.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cache.artifacts import MANIFEST, Artifact
from cache.files import TEMPORARY_PREFIX
from cache.ownership import remove_abandoned
from cache.ref_logps import RefLogps
from cache.row_keys import RowKeys
from stages.cache_ref.store_lookup import check_tokens, remember_store, store_of
from stages.cache_ref.work_units import WorkUnit, units_of
from stages.data.rows import SPLITS, RowSet, distinct_ids
from stages.engine.pack_check import checked_logps, longest_example
from stages.engine.packing import sized_packs
from stages.engine.packs import inputs_of
from stages.engine.row_logps import score_groups
from stages.models.fit import check_rows_fit
from stages.models.loading import ModelSource, load_model
from stages.models.vocabulary import TokensInUse
from stages.runtime.compute import Compute
from stages.runtime.context import Context, progress
from stages.runtime.limits import using_memory
from stages.runtime.shares import Worker, choose_worker

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer


@dataclass(frozen=True)
class CacheRefResult:
    """What a cache-ref run found and did; `forwards` counts forward passes of the reference."""

    reference: RefLogps
    rows_needed: int
    rows_scored: int
    forwards: int
    seconds: float


def cache_ref(
    rows: Sequence[Artifact],
    source: ModelSource,
    tokenizer: Any,
    compute: Compute,
    context: Context,
    share: str | None = None,
) -> CacheRefResult:
    """Score the rows of all of `rows` that are missing from the reference's store; does nothing when none is.

    `tokenizer` is the one that made the rows. With `share` (`i/N`), rows needed and missing are those of that share of
    the work. Raises `UsageError` where the reference has other tokens, or a row does not fit it.
    """
    worker = choose_worker(share)
    started = time.monotonic()
    reference = store_of(source, compute, context)
    row_sets = _row_sets(rows)
    check_tokens(TokensInUse(tokenizer, lambda: distinct_ids(row_sets)), source, context)
    needed = _needed_keys(row_sets, share)
    missing = len(reference.missing(needed))
    forwards = 0
    remove_abandoned(reference.folder, TEMPORARY_PREFIX)
    if missing:
        check_rows_fit(source, row_sets)
        longest = max(row_sets, key=RowSet.max_length)
        with using_memory(
            f"What was scored is kept. Lower compute.tokens_per_batch (now {compute.tokens_per_batch}), and type the same "
            f"command again."
        ):
            forwards = _score(
                units_of(row_sets, worker), longest, reference, source, compute, missing, context
            )
    remember_store(source, compute, reference, context)
    return CacheRefResult(reference, len(needed), missing, forwards, time.monotonic() - started)


def count_missing(
    rows: Sequence[Artifact],
    source: ModelSource,
    compute: Compute,
    context: Context,
    share: str | None = None,
) -> tuple[int, int, int]:
    """Rows needed, rows missing, and positions a run would compute, of all or of a share; writes nothing."""
    reference = store_of(source, compute, context)
    row_sets = _row_sets(rows)
    needed = _needed_keys(row_sets, share)
    positions = 0
    for unit in units_of(row_sets, Worker() if share is None else choose_worker(share)):
        examples = [inputs_of(unit.rows, group) for group in unit.unscored(reference).groups]
        positions += sum(size for size, _ in sized_packs(examples, compute.tokens_per_batch))
    return len(needed), len(reference.missing(needed)), positions


def _needed_keys(row_sets: Sequence[RowSet], share: str | None) -> RowKeys:
    """Each key once."""
    if share is None:
        keys = RowKeys.joined(row_set.keys for row_set in row_sets)
        return keys.only(keys.is_first())
    units = units_of(row_sets, choose_worker(share))
    return RowKeys.joined(unit.rows.keys.only(np.concatenate(unit.groups)) for unit in units)


def _row_sets(rows: Sequence[Artifact]) -> list[RowSet]:
    return [RowSet.of(artifact, split) for artifact in rows for split in SPLITS]


def _score(
    units: Iterable[WorkUnit],
    longest: RowSet,
    reference: RefLogps,
    source: ModelSource,
    compute: Compute,
    missing: int,
    context: Context,
) -> int:
    """Score the missing rows of the units and add them to the store; returns the number of forward passes."""
    # Brings transformers' modelling code: only when there is something to score.
    from stages.engine.scorer import Scorer

    context.log(
        f"Scoring {missing:,} rows with {source.name} ({compute.arithmetic} on {compute.device.type})"
    )
    scorer = Scorer(load_model(source, compute), compute, context.log)
    checked_logps(scorer, longest, longest_example(longest))
    scorer.forwards = 0
    with (
        progress("cache-ref", missing, "rows") as advance,
        ThreadPoolExecutor(max_workers=1) as writer,  # hashing and writing a unit while the next is scored
        torch.inference_mode(),
    ):
        began, tokens = time.monotonic(), 0
        written: Future[None] | None = None
        for unit in units:
            todo = unit.unscored(reference)
            if not todo.groups:
                continue
            values, num_positions = score_unit(todo, scorer)
            if written is not None:
                written.result()
            written = writer.submit(_add, reference, todo.keys, values, context)
            tokens += num_positions
            advance(len(values), f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
        if written is not None:
            written.result()
    return scorer.forwards


def _add(reference: RefLogps, keys: list[bytes], values: list[np.ndarray], context: Context) -> None:
    """Store the log-probs of a unit, also where the store itself is elsewhere."""
    path = reference.add(keys, values)
    context.store.send(reference.folder / MANIFEST)
    context.store.send(path)


def score_unit(unit: WorkUnit, scorer: "Scorer") -> tuple[list[np.ndarray], int]:
    """Token log-probs (float32, nats) of each row in the order of `unit.keys`, and the number of positions computed."""
    found, num_positions = score_groups(scorer, unit.rows, unit.groups)
    return [found[int(row)] for group in unit.groups for row in group], num_positions
