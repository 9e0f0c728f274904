"""Everything in a store, and which artifact was made from which.

In: the folder of a store. Out: an entry for each artifact, its inputs and its consumers. An artifact names its inputs in its
manifest: by fingerprint where they are hashed into its own, else by folder. Nothing but manifests is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from cache.artifacts import MANIFEST, is_artifact
from cache.errors import CorruptError
from cache.files import TEMPORARY_PREFIX, read_json
from cache.ownership import is_claimed
from stages.train.checkpoints import STATE, checkpoint_steps

# In the order in which they are made and shown.
KINDS = ("rows", "row-shares", "online-rows", "ref-logps", "policy", "merged", "completions", "verdicts")


@dataclass(frozen=True)
class Entry:
    """A finished artifact; `manifest` is empty if it cannot be read."""

    path: Path
    kind: str
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name

    @property
    def place(self) -> str:
        """Kind and folder, which together name it within the store."""
        return f"{self.kind}/{self.name}"

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of its identity; empty if its manifest cannot be read."""
        return self.manifest.get("fingerprint", "")

    @property
    def run_name(self) -> str | None:
        """The name that `train.name` gave it."""
        return self.manifest.get("provenance", {}).get("name")

    @property
    def created(self) -> datetime:
        """When it was finished."""
        stated = self.manifest.get("provenance", {}).get("created")
        return (
            datetime.fromisoformat(stated)
            if stated
            else datetime.fromtimestamp(self.path.stat().st_mtime, UTC)
        )

    @cached_property
    def num_bytes(self) -> int:
        """Its size on disk."""
        return folder_bytes(self.path)

    @cached_property
    def mentioned(self) -> frozenset[str]:
        """Every text in its identity and inputs, among which are the fingerprints and folders of what it was made from."""
        counts = self.manifest.get("counts", {})
        parts = (self.manifest.get("identity"), self.manifest.get("inputs"), counts.get("model"))
        return frozenset(text for part in parts for text in _texts(part))


@dataclass(frozen=True)
class Unfinished:
    """A folder that is being written, or was left by a process that ended; `step` is that of a training's newest checkpoint."""

    path: Path
    kind: str
    is_written: bool
    step: int | None
    identity: Mapping[str, Any] = field(repr=False)

    @property
    def mentioned(self) -> frozenset[str]:
        """As of an `Entry`: what the run needs to continue."""
        return frozenset(_texts(self.identity))


class Catalogue:
    """All artifacts of a store, in the order of their kinds and then of their age."""

    def __init__(self, root: Path) -> None:
        """Read the manifests."""
        self.root = root
        found = [entry for kind in KINDS for entry in _entries(root / kind)]
        self.entries = sorted(found, key=lambda entry: (KINDS.index(entry.kind), entry.created, entry.name))

    @cached_property
    def unfinished(self) -> list[Unfinished]:
        """Folders that no manifest ends."""
        folders = (path for kind in KINDS for path in sorted((self.root / kind).glob(f"{TEMPORARY_PREFIX}*")))
        return [_unfinished(path) for path in folders if path.is_dir()]

    def inputs(self, entry: Entry) -> list[Entry]:
        """What it was made from, as far as it is in the store."""
        return [other for other in self.entries if other is not entry and _made_from(entry, other)]

    def consumers(self, entry: Entry) -> list[Entry]:
        """What was made from it."""
        return [other for other in self.entries if other is not entry and _made_from(other, entry)]

    def data_files(self, entry: Entry) -> list[str]:
        """The files or hub names of the data that rows were made of."""
        return list(entry.manifest.get("provenance", {}).get("data_paths", []))

    def run_names(self, entry: Entry) -> set[str]:
        """Its own name and those of the runs it was made from: the completions of a run are found under its name."""
        names = {entry.run_name} if entry.run_name else set[str]()
        return names.union(*(self.run_names(other) for other in self.inputs(entry) if other.kind != "rows"))


def _made_from(entry: Entry, other: Entry) -> bool:
    """Whether `other` is an input of `entry`."""
    if other.fingerprint and other.fingerprint in entry.mentioned:
        return True
    if entry.kind == "rows" and other.kind == "online-rows":
        paths = entry.manifest.get("provenance", {}).get("data_paths", [])
        return any(other.name in Path(path).parts for path in paths)
    if entry.kind == "verdicts":
        return other.kind == "completions" and other.manifest.get("counts", {}).get(
            "model"
        ) in _texts_of_inputs(entry)
    # A model is named by its folder: what was made of it comes later in the order of kinds, so no circle is closed.
    is_later = KINDS.index(entry.kind) > KINDS.index(other.kind)
    return is_later and other.kind in ("policy", "merged") and other.name in entry.mentioned


def _texts_of_inputs(entry: Entry) -> set[str]:
    return set(_texts(entry.manifest.get("inputs")))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("*")):
        has_manifest = (path / MANIFEST).is_file() and not path.name.startswith(".")
        if has_manifest and (folder.name == "ref-logps" or is_artifact(path)):
            yield entry_of(path)


def entry_of(path: Path) -> Entry:
    """The entry of one artifact, in whatever store."""
    try:
        manifest = read_json(path / MANIFEST)
    except CorruptError:  # `align verify` says what is wrong with it
        manifest = {}
    return Entry(path, path.parent.name, manifest if isinstance(manifest, dict) else {})


def _unfinished(path: Path) -> Unfinished:
    steps = checkpoint_steps(path)
    state: Any = {}
    if steps:
        try:
            state = read_json(path / f"checkpoint-{steps[0]}" / STATE)
        except (CorruptError, OSError):
            state = {}
    identity = state.get("identity") or {}
    return Unfinished(path, path.parent.name, is_claimed(path), steps[0] if steps else None, identity)


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
