"""A store on object storage or behind HTTP: a mirror of it on this machine is the store that stages work in.

    URL/KIND/NAME/manifest.json              put last, and only where there is none: the first of two writers stays
    URL/KIND/NAME/SHA256/FILE, or .../FILE   as this module puts it, or as a copy of a local store has it
    URL/ref-logps/NAME/SHA256.arrow          each put whole

What is looked up is fetched, verified (`arrivals.py`) and only then in the mirror; what is made is put back, object by object. Objects are never
changed: those of different content have different names, so that writers need no lock and readers see old or new.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cache import effects
from cache.arrivals import KINDS, REF_LOGPS, admit
from cache.artifacts import DIGEST, MANIFEST, Artifact, Draft, Store, open_artifact
from cache.errors import CorruptError
from cache.files import TEMPORARY_PREFIX, disk_errors_named, read_with_digest, write_bytes
from cache.fingerprint import SHORT, fingerprint, short
from cache.locations import Objects, is_url
from cache.names import check_name
from cache.ownership import claim_temporary
from cache.shards import SHARD_SUFFIX

ARTIFACT_NAMES = "*-" + "[0-9a-f]" * SHORT
SHARD_NAMES = "[0-9a-f]" * 64 + SHARD_SUFFIX


def open_store(where: str) -> Store:
    """The store in a folder, or at a URL."""
    return MirroredStore(where) if is_url(where) else Store(Path(where))


def mirror_of(url: str) -> Path:
    """The folder of this machine that mirrors a store: below `ALIGN_MIRRORS`, by default below the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"
    return Path(os.environ.get("ALIGN_MIRRORS") or caches) / short(fingerprint({"url": url.rstrip("/")}))


class MirroredStore(Store):
    """A store at a URL of fsspec."""

    def __init__(self, url: str) -> None:
        """Nothing is reached before something is looked up."""
        super().__init__(mirror_of(url))
        self._remote = Objects(url)
        self._sent: set[Path] = set()

    @property
    def address(self) -> str:
        """Its URL."""
        return self._remote.url

    def find(self, kind: str, name: str, identity: Mapping[str, Any]) -> Artifact | None:
        """As of any store; fetched if it is not here, and put back if it is here alone."""
        folder = self.folder(kind, name, identity)
        if not folder.is_dir():
            self.bring(kind, folder.name)
        found = super().find(kind, name, identity)
        if found is not None and self._remote.is_writable:
            self.send(folder)
        return found

    def draft(
        self, kind: str, name: str, stage: str, identity: Mapping[str, Any], keep: bool = False
    ) -> Draft:
        """As of any store; raises `UsageError` where nothing can be put."""
        self._remote.check_writable()
        return super().draft(kind, name, stage, identity, keep)

    def publish(
        self,
        draft: Draft,
        counts: Mapping[str, Any],
        inputs: Mapping[str, str],
        config_text: str,
        **provenance: Any,
    ) -> Artifact:
        """Publish in the mirror, then put it back."""
        published = super().publish(draft, counts, inputs, config_text, **provenance)
        self.send(published.path)
        return published

    def bring(self, kind: str, pattern: str = ARTIFACT_NAMES) -> None:
        """Fetch the artifacts of a kind whose names match and that are not here, and shards that were added to log-probs."""
        names = self._remote.names(kind) if "*" in pattern else [pattern]
        for name in names:
            if fnmatchcase(name, pattern) and fnmatchcase(name, ARTIFACT_NAMES):
                check_name(name, self._remote.url)
                self._fetch_folder(kind, name)

    def bring_all(self) -> None:
        """Fetch everything."""
        for kind in KINDS:
            self.bring(kind)

    def bring_file(self, path: Path) -> None:
        """Fetch a single file of the mirror that is not here; its reader checks it."""
        if not path.is_file() and (content := self._remote.read(self._key(path))) is not None:
            write_bytes(path, content)

    def send(self, path: Path) -> None:
        """Put back an artifact, or a file of log-probs; what is there stays."""
        if path in self._sent:
            return
        if path.is_file():
            self._remote.put_new(self._key(path), path)
        elif path.parent.name == REF_LOGPS:
            there = set(self._remote.names(self._key(path)))
            for file in [path / MANIFEST, *sorted(path.glob(f"*{SHARD_SUFFIX}"))]:
                if file.name not in there:
                    self.send(file)
        elif self._remote.read(f"{self._key(path)}/{MANIFEST}") is None:
            for record in open_artifact(path).manifest["files"]:
                name = f"{self._key(path)}/{record['sha256']}/{record['name']}"
                self._remote.put_new(name, path / record["name"])
            self._remote.put_new(f"{self._key(path)}/{MANIFEST}", path / MANIFEST)
        self._sent.add(path)

    def send_note(self, path: Path) -> None:
        """Put back a file that may change, where anything can be put."""
        if self._remote.is_writable:
            self._remote.put(self._key(path), path)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _fetch_folder(self, kind: str, name: str) -> None:
        is_ref_logps = kind == REF_LOGPS
        if (self.root / kind / name).is_dir() and not is_ref_logps:
            return
        content = self._remote.read(f"{kind}/{name}/{MANIFEST}")
        if content is None:
            return
        with self._staging() as folder:
            staged = folder / kind / name
            write_bytes(staged / MANIFEST, content)
            (self._fetch_shards if is_ref_logps else self._fetch_files)(f"{kind}/{name}", staged)
            admit(staged, self, self._remote.url)

    def _fetch_shards(self, key: str, staged: Path) -> None:
        for name in self._remote.names(key):
            if fnmatchcase(name, SHARD_NAMES) and not (self.root / key / name).is_file():
                self._remote.fetch(f"{key}/{name}", staged / name)

    def _fetch_files(self, key: str, staged: Path) -> None:
        where = f"{self._remote.url}/{key}"
        manifest = read_with_digest(staged / MANIFEST, DIGEST, f"It came from {where}: delete it there.")
        for record in manifest["files"]:
            check_name(record["name"], where)
            check_name(record["sha256"], where)
            names = (f"{key}/{record['sha256']}/{record['name']}", f"{key}/{record['name']}")
            if not any(self._remote.fetch(name, staged / record["name"]) for name in names):
                raise CorruptError(f"{where}/{record['name']} is missing. Delete {where}, and make it again.")

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        with disk_errors_named(self.root):
            folder, owner = claim_temporary(self.root / f"{TEMPORARY_PREFIX}fetched")
        try:
            yield folder
        finally:
            owner.release()
            with disk_errors_named(folder):
                effects.remove_tree(folder)
