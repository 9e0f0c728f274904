"""`align export` and `align import`: artifacts and stores of reference log-probs as one portable file, and back.

Out: an archive (`cache/archive.py`) of everything that a folder, or all folders of a store, consist of; for reference log-probs with the
notes that lead from the name of a model to them. In: such an archive, verified byte by byte before anything of it is in the store.
"""

from pathlib import Path
from typing import IO

from cache import effects
from cache.archive import unpack_archive, write_archive
from cache.arrivals import KINDS, REF_LOGPS, Arrived, admit
from cache.artifacts import MANIFEST, Store, open_artifact
from cache.errors import CorruptError, StaleError
from cache.files import TEMPORARY_PREFIX, disk_errors_named, write_bytes
from cache.fingerprint import short
from cache.ownership import claim_temporary
from cache.ref_logps import RefLogps
from cache.shards import SHARD_SUFFIX
from stages.cache_ref.store_lookup import NOTES, check_note, notes_of
from stages.verify import artifacts_in, identity_in

STAGING = f"{TEMPORARY_PREFIX}import"


def export_archive(path: Path, file: IO[bytes]) -> tuple[list[Path], int]:
    """Pack the artifact at `path`, or all in a store, into `file`; returns their folders, and the bytes of all files.

    Raises `StaleError` where there is none, and `CorruptError` where one is damaged: nothing damaged is passed on.
    """
    folders = [folder for folder in artifacts_in(path) if folder.parent.name in KINDS]
    if not folders:
        raise StaleError(
            f"{path} holds no artifact. Name a store, or one artifact in it, such as artifacts/ref-logps/NAME."
        )
    files: dict[str, Path] = {}
    sha256: dict[str, str] = {}
    for folder in folders:
        prefix = f"{folder.parent.name}/{folder.name}/"
        listed = _files_in(folder)
        files |= {prefix + name: folder / name for name in listed}
        sha256 |= {prefix + name: digest for name, digest in listed.items() if digest is not None}
        if folder.parent.name == REF_LOGPS:
            files |= {f"{REF_LOGPS}/{NOTES}/{note.name}": note for note in notes_of(folder)}
    return folders, write_archive(file, files, sha256)


def import_archive(file: IO[bytes], where: str, store: Store) -> list[Arrived]:
    """Put all artifacts of an archive into a store; `where` names the archive in messages.

    Raises `CorruptError` or `StaleError` for an archive that is damaged, hostile or of another version; then nothing of the artifact in
    question is in the store.
    """
    with disk_errors_named(store.root):
        staging, owner = claim_temporary(store.root / STAGING)
    try:
        with disk_errors_named(staging):
            names = unpack_archive(file, staging, where)
        folders = sorted({tuple(name.split("/")[:2]) for name in names})
        if any(len(name.split("/")) < 3 for name in names):
            raise CorruptError(f"{where} holds files outside of KIND/NAME/, which are no artifacts.")
        arrived = [admit(staging / kind / name, store, where) for kind, name in folders if name != NOTES]
        _admit_notes(staging / REF_LOGPS / NOTES, store, where)
        return arrived
    finally:
        owner.release()
        with disk_errors_named(staging):
            effects.remove_tree(staging)


def _files_in(folder: Path) -> dict[str, str | None]:
    """The files of an artifact by name, with the sha256 that they must have where that is known from elsewhere."""
    if folder.parent.name == REF_LOGPS:
        RefLogps(folder, identity_in(folder), believe_notes=False)
        shards = {path.name: path.name.removesuffix(SHARD_SUFFIX) for path in folder.glob(f"*{SHARD_SUFFIX}")}
        return {MANIFEST: None, **shards}
    artifact = open_artifact(folder)
    if not folder.name.endswith(short(artifact.fingerprint)):
        raise StaleError(
            f"{folder} holds another artifact than its name says. Rename it to end in {short(artifact.fingerprint)}."
        )
    return {MANIFEST: None, **{record["name"]: record["sha256"] for record in artifact.manifest["files"]}}


def _admit_notes(staged: Path, store: Store, where: str) -> None:
    """Notes that the store has are kept: they are about the files of models on this machine."""
    for note in sorted(staged.glob("*")):
        check_note(note, where)
        final = store.root / REF_LOGPS / NOTES / note.name
        if not final.is_file():
            write_bytes(final, note.read_bytes())
