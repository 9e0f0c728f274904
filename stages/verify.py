"""`align verify`: reads every byte of a store and says what is damaged, missing, or does not fit together.

In: a store, a folder of it, or one artifact. Out: a `Checked` for each artifact. Nothing is written, not even a note that a
file was checked. Files: every sha256. Rows: their keys are those of their token ids. Reference log-probs: values are
log-probs, no row has two, and their numbers are those of the tokens of prepared rows. Inputs that are gone are noted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache.arrivals import REF_LOGPS
from cache.artifacts import MANIFEST, Artifact, is_artifact, open_artifact
from cache.checked import CHECKED
from cache.errors import AlignError, CorruptError, StaleError
from cache.files import TEMPORARY_PREFIX, read_json, sha256_file
from cache.fingerprint import row_key, short
from cache.ref_logps import REPAIR, RefLogps
from cache.shards import SHARD_SUFFIX, read_shard
from stages.cache_ref.store_lookup import NOTES
from stages.data.rows import SPLITS, RowSet


@dataclass
class Checked:
    """One artifact: what was read of it, what is wrong (`problems`, as errors), what is worth knowing (`notes`)."""

    path: Path
    kind: str
    num_files: int = 0
    num_bytes: int = 0
    num_rows: int = 0
    problems: list[AlignError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(path: Path, advance: Callable[[int, str], None]) -> list[Checked]:
    """Check everything under `path`; raises `StaleError` where there is no artifact. `advance` is told of each artifact."""
    folders = list(artifacts_in(path))
    if not folders:
        raise StaleError(
            f"{path} holds no artifact. Name a store (--store DIR), a folder of it, or one artifact."
        )
    rows: list[tuple[Artifact, list[RowSet]]] = []
    stores: list[tuple[Checked, RefLogps]] = []
    found: list[Checked] = []
    for folder in folders:
        checked = Checked(folder, folder.parent.name)
        found.append(checked)
        try:
            if _is_ref_logps(folder):
                stores.append((checked, _check_ref_logps(checked)))
            else:
                artifact = _check_artifact(checked)
                if checked.kind == "rows" and not checked.problems:
                    rows.append((artifact, _check_rows(checked, artifact)))
        except AlignError as problem:
            checked.problems.append(problem)
        advance(1, folder.name)
    for checked, store in stores:
        for artifact, row_sets in rows:
            _check_agreement(checked, store, artifact, row_sets)
    _note_missing_inputs(found)
    return found


def artifacts_in(path: Path) -> Iterator[Path]:
    """The folders of artifacts: `path` itself, or those in it and in its folders; drafts are left out."""
    if is_artifact(path) or _is_ref_logps(path):
        yield path
        return
    for folder in sorted(entry for entry in path.glob("*") if entry.is_dir()):
        if folder.name.startswith(TEMPORARY_PREFIX) or folder.name == NOTES:
            continue
        if is_artifact(folder) or _is_ref_logps(folder):
            yield folder
        elif folder.parent == path:
            yield from (one for one in artifacts_in(folder) if one.parent == folder)


def _is_ref_logps(folder: Path) -> bool:
    return folder.parent.name == REF_LOGPS and any(folder.glob(f"*{SHARD_SUFFIX}"))


def _check_artifact(checked: Checked) -> Artifact:
    artifact = open_artifact(checked.path)
    records = {record["name"]: record for record in artifact.manifest["files"]}
    repair = f"Delete {checked.path} and run `align {artifact.manifest['stage']}` again."
    for name, record in records.items():
        file = checked.path / name
        if not file.is_file():
            checked.problems.append(StaleError(f"{file} is missing. {repair}"))
        elif sha256_file(file) != record["sha256"]:
            checked.problems.append(
                CorruptError(f"{file} is damaged: its sha256 is not the one that was written. {repair}")
            )
        else:
            checked.num_files, checked.num_bytes = (
                checked.num_files + 1,
                checked.num_bytes + file.stat().st_size,
            )
    if not checked.path.name.endswith(short(artifact.fingerprint)):
        checked.problems.append(
            StaleError(
                f"{checked.path} holds the artifact {short(artifact.fingerprint)}. Rename it so that it ends in that."
            )
        )
    own = {str(file.relative_to(checked.path)) for file in checked.path.rglob("*") if file.is_file()}
    for name in sorted(own - records.keys() - {MANIFEST, CHECKED}):
        checked.notes.append(f"{name} is not listed in the manifest")
    return artifact


def _check_rows(checked: Checked, artifact: Artifact) -> list[RowSet]:
    """The rows of each split; a key that is not that of its row's token ids is a problem."""
    row_sets = [RowSet.of(artifact, split) for split in SPLITS]
    for row_set in row_sets:
        checked.num_rows += len(row_set)
        for row, key in enumerate(row_set.keys):
            if row_key(row_set.prompt(row), row_set.completion(row)) != key:
                raise CorruptError(
                    f"{checked.path}: the key of row {row_set.sources[row]} is not that of its token ids. Delete {checked.path} and "
                    f"run `align prepare` again."
                )
    return row_sets


def _check_ref_logps(checked: Checked) -> RefLogps:
    store = RefLogps(checked.path, identity_in(checked.path), believe_notes=False)
    if not checked.path.name.endswith(short(store.fingerprint)):
        checked.problems.append(
            StaleError(
                f"{checked.path} holds log-probs of the reference {short(store.fingerprint)}. Rename it so that it ends in that."
            )
        )
    for path in sorted(checked.path.glob(f"*{SHARD_SUFFIX}")):
        table = read_shard(path, path.name.removesuffix(SHARD_SUFFIX), REPAIR)
        checked.num_files, checked.num_bytes = checked.num_files + 1, checked.num_bytes + path.stat().st_size
        columns = (table.column(name).to_pylist() for name in ("row_key", "token_logps"))
        for key, values in zip(*columns, strict=True):
            if not np.array_equal(store.get(key), np.array(values, np.float32)):
                raise CorruptError(f"{path}: row {key.hex()} has other log-probs in another shard. {REPAIR}")
    checked.num_rows = len(store)
    return store


def identity_in(folder: Path) -> dict[str, Any]:
    """The identity in the manifest of reference log-probs; raises `StaleError` or `CorruptError` where there is none."""
    repair = "Run `align cache-ref` again: no row is scored again."
    if not (folder / MANIFEST).is_file():
        raise StaleError(f"{folder / MANIFEST} is missing. {repair}")
    manifest = read_json(folder / MANIFEST, f"Delete it. {repair}")
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    if not isinstance(identity, dict):
        raise CorruptError(f"{folder / MANIFEST} was changed after it was written. Delete it. {repair}")
    return identity


def _check_agreement(checked: Checked, store: RefLogps, artifact: Artifact, row_sets: list[RowSet]) -> None:
    """Each row that is in both has as many log-probs as completion tokens."""
    covered = total = 0
    for row_set in row_sets:
        total += len(row_set)
        for row, key in enumerate(row_set.keys):
            if key not in store:
                continue
            covered += 1
            if len(store.get(key)) != row_set.completion_lengths[row]:
                checked.problems.append(
                    CorruptError(
                        f"{checked.path} has {len(store.get(key))} log-probs of row {row_set.sources[row]}, which has "
                        f"{row_set.completion_lengths[row]} tokens in {artifact.path}. Delete {checked.path} and run `align cache-ref` again."
                    )
                )
                return
    if covered:
        checked.notes.append(f"has {covered:,} of {total:,} rows of {artifact.path.name}")


def _note_missing_inputs(found: list[Checked]) -> None:
    """Note the rows and log-probs that a policy was made from and that are not among what was checked."""
    if len(found) < 2:
        return
    names = {checked.path.name for checked in found}
    for checked in found:
        if checked.kind != "policy" or checked.problems:
            continue
        identity: Mapping[str, Any] = open_artifact(checked.path).manifest["identity"]
        for what in ("rows", "reference"):
            made_from = identity.get(what)
            if made_from and not any(name.endswith(short(made_from)) for name in names):
                checked.notes.append(f"was made from {what} {short(made_from)}, which are not here")
