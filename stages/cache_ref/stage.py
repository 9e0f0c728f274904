"""Stage 2 of 4: rows -> reference log-probs, one float32 for every completion token.

Loads the frozen reference once, scores only the rows that no earlier run scored, and appends shards
to `ref-logps/<reference>-<fingerprint>`. The work is cut into units of consecutive examples and each
unit into packs, both functions of the rows alone: a killed run loses at most the unit in hand and the
one being written meanwhile, and a resumed run writes the bytes an uninterrupted one would. A row that several units
hold belongs to the first of them. Under `torchrun`, or as independent jobs with `--shard 1/8` ... `--shard 8/8`, each
process scores its own units; they need not talk, and together they write the bytes that one would. Run it with
`align cache-ref`.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cache.artifacts import Artifact
from cache.errors import StaleError, UsageError
from cache.files import read_json, write_json
from cache.fingerprint import differing_fields, fingerprint, short
from cache.ref_logps import RefLogps
from stages.data.rows import SPLITS, RowSet
from stages.engine.pack_check import checked_logps, longest_example
from stages.engine.packing import pack_lengths
from stages.engine.packs import build_pack, fed_length
from stages.models.loading import ModelSource, check_length, load_model, reference_identity
from stages.runtime.compute import Compute
from stages.runtime.context import Context, progress

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

UNIT_EXAMPLES = 256


@dataclass(frozen=True)
class Worker:
    """Which of how many processes this one is; it takes every `count`-th unit."""

    index: int = 0
    count: int = 1


def choose_worker(shard: str | None) -> Worker:
    """The worker of `--shard i/N` (i from 1), else of torchrun's environment; raises `UsageError` for anything else."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if shard is None:
        return Worker(rank, size)
    index, slash, count = shard.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard {shard}: expected i/N with i from 1 to N, for example --shard 1/8.")
    if size > 1:
        raise UsageError(
            "--shard is for independent jobs; under torchrun the ranks divide the work by themselves."
        )
    return Worker(int(index) - 1, int(count))


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
    revision: str | None,
    compute: Compute,
    context: Context,
    shard: str | None = None,
) -> CacheRefResult:
    """Score what is missing for all of `rows` and return the store; does nothing when nothing is missing.

    With `shard` (`i/N`), rows needed and missing are those of that share of the work.
    """
    worker = choose_worker(shard)
    started = time.monotonic()
    identity = reference_identity(source, compute)
    reference = RefLogps(_folder(context, source.short_name, identity), identity)
    row_sets = [RowSet.of(artifact, split) for artifact in rows for split in SPLITS]
    if shard is None:
        needed = {key for row_set in row_sets for key in row_set.keys}
    else:
        own = _work(row_sets, worker)
        needed = {row_set.keys[row] for row_set, groups in own for group in groups for row in group}
    missing = len(reference.missing(needed))
    forwards = 0
    if missing:
        check_length(source.folder, max(row_set.max_length() for row_set in row_sets))
        longest = max(row_sets, key=RowSet.max_length)
        work = _work(row_sets, worker)
        forwards = _score(work, longest, reference, source, compute, missing, context)
    _remember(source, revision, compute, reference, context)
    return CacheRefResult(reference, len(needed), missing, forwards, time.monotonic() - started)


def count_missing(
    rows: Sequence[Artifact], source: ModelSource, compute: Compute, context: Context
) -> tuple[int, int, int]:
    """Rows needed, rows missing, and positions a run would compute; writes nothing."""
    identity = reference_identity(source, compute)
    reference = RefLogps(_folder(context, source.short_name, identity), identity)
    row_sets = [RowSet.of(artifact, split) for artifact in rows for split in SPLITS]
    needed = {key for row_set in row_sets for key in row_set.keys}
    tokens = sum(
        fed_length(row_set, group)
        for row_set, groups in _work(row_sets, Worker())
        for group in _without_scored(row_set, groups, reference)
    )
    return len(needed), len(reference.missing(needed)), tokens


def open_reference(
    source_name: str, revision: str | None, compute: Compute, context: Context, check_files: bool = True
) -> RefLogps:
    """The store that cache-ref filled for this reference, without touching the reference's weights.

    Raises `StaleError` when there is none, or (`check_files`) when the model's files have changed since.
    """
    path = _pointer(source_name, revision, compute, context)
    if not path.is_file():
        raise StaleError(
            f"No reference log-probs of {source_name} in {compute.arithmetic} are in {context.store.root}. "
            f"Make them with: {context.command('cache-ref')}"
        )
    pointer = read_json(path)
    now = _stat_files(Path(pointer["folder"]))
    if check_files and now and now != pointer["files"]:
        names = {*now, *pointer["files"]}
        changed = ", ".join(sorted(name for name in names if now.get(name) != pointer["files"].get(name)))
        raise StaleError(
            f"The model {source_name} has changed since its log-probs were cached (size or date of {changed}). "
            f"Look whether its content did, which costs nothing if not, with: {context.command('cache-ref')}"
        )
    return RefLogps(context.store.root / "ref-logps" / pointer["store"], pointer["identity"])


def check_same_model(reference: RefLogps, policy_identity: dict[str, Any], context: Context) -> None:
    """Raise `StaleError` naming the fields in which the cached reference differs from the policy's start."""
    fields = differing_fields(reference.identity, policy_identity)
    if fields:
        raise StaleError(
            f"The cached reference log-probs in {reference.folder} are not of the policy's own starting weights: "
            f"{'; '.join(fields)}. Run: {context.command('cache-ref')}"
        )


def _score(
    work: Iterable[tuple[RowSet, list[np.ndarray]]],
    longest: RowSet,
    reference: RefLogps,
    source: ModelSource,
    compute: Compute,
    missing: int,
    context: Context,
) -> int:
    from stages.engine.scorer import (
        Scorer,
    )  # brings transformers' modelling code: only when there is something to score

    context.say(
        f"Scoring {missing:,} rows with {source.name} ({compute.arithmetic} on {compute.device.type})"
    )
    scorer = Scorer(load_model(source, compute), compute, context.say)
    checked_logps(scorer, longest, longest_example(longest))
    scorer.forwards = 0
    with (
        progress("cache-ref", missing, "rows") as advance,
        ThreadPoolExecutor(max_workers=1) as writer,  # hashing and writing a unit while the next is scored
        torch.inference_mode(),
    ):
        began, tokens = time.monotonic(), 0
        written: Future[Path] | None = None
        for rows, groups in work:
            todo = _without_scored(rows, groups, reference)
            if not todo:
                continue
            keys, values, unit_tokens = _score_unit(rows, todo, scorer)
            if written is not None:
                written.result()
            written = writer.submit(reference.add, keys, values)
            tokens += unit_tokens
            advance(len(keys), f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
        if written is not None:
            written.result()
    return scorer.forwards


def _work(row_sets: list[RowSet], worker: Worker) -> Iterator[tuple[RowSet, list[np.ndarray]]]:
    """This worker's units, each key in the first unit that holds it: disjoint, whatever the number of workers."""
    seen: set[bytes] = set()
    for number, (rows, groups) in enumerate(_units(row_sets)):
        firsts = []
        for group in groups:
            first = [row for row in group if rows.keys[row] not in seen]
            fresh = {rows.keys[row]: row for row in reversed(first)}
            seen.update(fresh)
            if fresh:
                firsts.append(np.array(sorted(fresh.values())))
        if firsts and number % worker.count == worker.index:
            yield rows, firsts


def _units(row_sets: list[RowSet]) -> Iterator[tuple[RowSet, list[np.ndarray]]]:
    """Runs of consecutive examples, each example the row numbers of all its rows."""
    for rows in row_sets:
        for begin in range(0, rows.num_examples, UNIT_EXAMPLES):
            examples = range(begin, min(begin + UNIT_EXAMPLES, rows.num_examples))
            yield rows, [np.arange(rows.starts[example], rows.ends[example]) for example in examples]


def _without_scored(rows: RowSet, groups: list[np.ndarray], reference: RefLogps) -> list[np.ndarray]:
    """The rows of a unit that still need scoring."""
    todo = [np.array([row for row in group if rows.keys[row] not in reference]) for group in groups]
    return [group for group in todo if len(group)]


def _score_unit(
    rows: RowSet, groups: list[np.ndarray], scorer: "Scorer"
) -> tuple[list[bytes], list[np.ndarray], int]:
    """Keys, token log-probs in key order of the unit, and positions computed."""
    lengths = [fed_length(rows, group) for group in groups]
    batches = (
        build_pack(rows, [groups[item] for item in items])
        for items in pack_lengths(lengths, scorer.compute.tokens_per_batch)
    )
    # Values stay on the device until the unit is done, so that a GPU computes while the next pack is built.
    scored = [(batch.rows, scorer(batch).completion_logps) for batch in batches]
    found: dict[int, np.ndarray] = {}
    for numbers, token_logps in scored:
        ends = np.cumsum(rows.completion_lengths[numbers])
        found.update(zip(numbers.tolist(), np.split(token_logps.cpu().numpy(), ends[:-1]), strict=True))
    order = [int(row) for group in groups for row in group]
    return [rows.keys[row] for row in order], [found[row] for row in order], sum(lengths)


def _folder(context: Context, name: str, identity: dict[str, Any]) -> Path:
    """The store of this reference; the content decides, whatever name it was first cached under."""
    root, digits = context.store.root / "ref-logps", short(fingerprint(identity))
    return next(iter(sorted(root.glob(f"*-{digits}"))), root / f"{name}-{digits}")


def _pointer(name: str, revision: str | None, compute: Compute, context: Context) -> Path:
    """Where cache-ref notes which store belongs to a model name, so that train need not hash the model."""
    asked = fingerprint({"model": name, "revision": revision, "dtype": compute.arithmetic})
    return context.store.root / "ref-logps" / "by-model" / f"{short(asked)}.json"


def _remember(
    source: ModelSource, revision: str | None, compute: Compute, reference: RefLogps, context: Context
) -> None:
    folder = source.folder.resolve()
    note = {
        "model": source.name,
        "folder": str(folder),
        "files": _stat_files(folder),
        "store": reference.folder.name,
        "identity": reference.identity,
    }
    path = _pointer(source.name, revision, compute, context)
    if not path.is_file() or read_json(path) != note:
        write_json(path, note)


def _stat_files(folder: Path) -> dict[str, list[int]]:
    """Size, modification and change time (ns) of the model's files; empty when the folder cannot be looked at."""
    try:
        paths = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
        return {
            path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path in paths
        }
    except OSError:
        return {}
