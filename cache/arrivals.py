"""Artifacts that come from elsewhere: read byte by byte, then put into a store as if they had been made there.

In: a folder `KIND/NAME` of staged files.  Out: the same folder in a store, where it is new, or that of the store, where it has the same
content. Reference log-probs are put together shard by shard.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import effects
from cache.artifacts import MANIFEST, Store, open_artifact
from cache.checked import CHECKED
from cache.errors import AlignError, CorruptError, StaleError
from cache.files import commit, disk_errors_named, publish_folder, read_json
from cache.fingerprint import fingerprint, short
from cache.ref_logps import RefLogps
from cache.shards import SHARD_SUFFIX

REF_LOGPS = "ref-logps"
KINDS = ("rows", "row-shares", REF_LOGPS, "policy", "merged", "completions", "verdicts", "online-rows")


@dataclass(frozen=True)
class Arrived:
    """An artifact that is in the store now; `reused` if all of it was there before."""

    path: Path
    num_files: int
    num_bytes: int
    reused: bool


def admit(staged: Path, store: Store, where: str) -> Arrived:
    """Verify a staged folder and put it into the store; raises `CorruptError` or `StaleError`. `where` names its origin."""
    files = [path for path in staged.rglob("*") if path.is_file() and path.name != CHECKED]
    size = sum(path.stat().st_size for path in files)
    if staged.parent.name not in KINDS:
        raise CorruptError(f"{where} holds {staged.parent.name}/, which is no folder of a store.")
    is_ref_logps = staged.parent.name == REF_LOGPS
    with _said_of(staged, where):
        (_check_ref_logps if is_ref_logps else _check_artifact)(staged, where)
    final = store.root / staged.parent.name / staged.name
    path, reused = (_admit_ref_logps if is_ref_logps else _admit_artifact)(staged, final)
    return Arrived(path, len(files), size, reused)


@contextmanager
def _said_of(staged: Path, where: str) -> Iterator[None]:
    """An error about the staged folder says where that came from, and no name of the temporary folder."""
    try:
        yield
    except AlignError as error:
        reason = str(error).replace(f"{staged}/", f"{staged.name}/").replace(str(staged), staged.name)
        raise type(error)(
            reason if where in reason else f"{where}: {reason.split('. ')[0]}. Nothing of it was taken."
        ) from error


def _check_artifact(staged: Path, where: str) -> None:
    arrived = open_artifact(staged)
    _check_fingerprint(staged, arrived.fingerprint, arrived.manifest["identity"], where)
    arrived.check_files()
    listed = {record["name"] for record in arrived.manifest["files"]}
    _refuse_others(staged, listed | {MANIFEST, CHECKED}, where)


def _admit_artifact(staged: Path, final: Path) -> tuple[Path, bool]:
    if not final.is_dir():
        with disk_errors_named(final):
            effects.make_folders(final.parent)
        publish_folder(staged, final)
        return final, False
    there = open_artifact(final)
    if there.fingerprint != open_artifact(staged).fingerprint:
        raise StaleError(
            f"{final} holds another artifact than its name says. Rename or delete it, and import again."
        )
    there.check_files()
    return final, True


def _check_ref_logps(staged: Path, where: str) -> None:
    manifest = read_json(staged / MANIFEST) if (staged / MANIFEST).is_file() else None
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    if not isinstance(identity, dict):
        raise CorruptError(f"{where} holds log-probs without the {MANIFEST} of their reference.")
    _check_fingerprint(staged, RefLogps(staged, identity, believe_notes=False).fingerprint, identity, where)
    _refuse_others(staged, {MANIFEST, *(path.name for path in staged.glob(f"*{SHARD_SUFFIX}"))}, where)


def _admit_ref_logps(staged: Path, final: Path) -> tuple[Path, bool]:
    identity = read_json(staged / MANIFEST)["identity"]
    # The content decides, whatever name the model had when its log-probs were first stored.
    final = next(iter(sorted(final.parent.glob(f"*-{short(fingerprint(identity))}"))), final)
    if not final.is_dir():
        with disk_errors_named(final):
            effects.make_folders(final.parent)
        publish_folder(staged, final)
        return final, False
    there = RefLogps(final, identity)
    shards = sorted(staged.glob(f"*{SHARD_SUFFIX}"))
    new = [path for path in shards if not (final / path.name).is_file()]
    with disk_errors_named(final):
        for path in new:
            commit(path, final / path.name)
    there.write_manifest()
    return final, not new


def _check_fingerprint(staged: Path, found: str, identity: Mapping[str, Any], where: str) -> None:
    if fingerprint(identity) != found or not staged.name.endswith(f"-{short(found)}"):
        raise CorruptError(
            f"{where}: {staged.parent.name}/{staged.name} is not the artifact that its name says."
        )


def _refuse_others(staged: Path, known: set[str], where: str) -> None:
    found = {str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()}
    if found - known:
        raise CorruptError(f"{where}: {sorted(found - known)[0]} in {staged.name} is listed nowhere.")
