"""Which store of reference log-probs belongs to which model.

A store is named by the content of the model. Because hashing the weights takes time, cache-ref also notes which
store a model name led to and the size and dates of the model's files; `train` reads this note.
"""

from pathlib import Path
from typing import Any

from cache.errors import StaleError
from cache.files import read_json, write_json
from cache.fingerprint import differing_fields, fingerprint, short
from cache.ref_logps import RefLogps
from stages.models.loading import ModelSource, reference_identity
from stages.runtime.compute import Compute
from stages.runtime.context import Context


def store_of(source: ModelSource, compute: Compute, context: Context) -> RefLogps:
    """The store of this reference, found by the content of its weights; empty before the first run."""
    identity = reference_identity(source, compute)
    root, digits = context.store.root / "ref-logps", short(fingerprint(identity))
    # The content decides, whatever name the model was first cached under.
    folder = next(iter(sorted(root.glob(f"*-{digits}"))), root / f"{source.short_name}-{digits}")
    return RefLogps(folder, identity)


def open_reference(
    source_name: str, revision: str | None, compute: Compute, context: Context, check_files: bool = True
) -> RefLogps:
    """The store that cache-ref filled for this reference, found by the note it left; the weights are not read.

    Raises `StaleError` when there is no note, or (`check_files`) when the model's files have changed since.
    """
    path = _note_path(source_name, revision, compute, context)
    if not path.is_file():
        raise StaleError(
            f"No reference log-probs of {source_name} in {compute.arithmetic} are in {context.store.root}. "
            f"Make them with: {context.command('cache-ref')}"
        )
    note = read_json(path)
    now = _stat_files(Path(note["folder"]))
    if check_files and now and now != note["files"]:
        names = {*now, *note["files"]}
        changed = ", ".join(sorted(name for name in names if now.get(name) != note["files"].get(name)))
        raise StaleError(
            f"The model {source_name} has changed since its log-probs were cached (size or date of {changed}). "
            f"Look whether its content did, which costs nothing if not, with: {context.command('cache-ref')}"
        )
    return RefLogps(context.store.root / "ref-logps" / note["store"], note["identity"])


def check_same_model(reference: RefLogps, policy_identity: dict[str, Any], context: Context) -> None:
    """Raise `StaleError` naming the fields in which the cached reference differs from the policy's start."""
    fields = differing_fields(reference.identity, policy_identity)
    if fields:
        raise StaleError(
            f"The cached reference log-probs in {reference.folder} are not of the policy's own starting weights: "
            f"{'; '.join(fields)}. Run: {context.command('cache-ref')}"
        )


def remember_store(
    source: ModelSource, revision: str | None, compute: Compute, reference: RefLogps, context: Context
) -> None:
    """Note which store this model name led to, for `open_reference`."""
    folder = source.folder.resolve()
    note = {
        "model": source.name,
        "folder": str(folder),
        "files": _stat_files(folder),
        "store": reference.folder.name,
        "identity": reference.identity,
    }
    path = _note_path(source.name, revision, compute, context)
    if not path.is_file() or read_json(path) != note:
        write_json(path, note)


def _note_path(name: str, revision: str | None, compute: Compute, context: Context) -> Path:
    key = fingerprint({"model": name, "revision": revision, "dtype": compute.arithmetic})
    return context.store.root / "ref-logps" / "by-model" / f"{short(key)}.json"


def _stat_files(folder: Path) -> dict[str, list[int]]:
    """Size, modification and change time (ns) of the model's files; empty where the folder cannot be read."""
    try:
        paths = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
        return {
            path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path in paths
        }
    except OSError:
        return {}
