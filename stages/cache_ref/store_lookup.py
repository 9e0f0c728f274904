"""Which store of reference log-probs belongs to which model.

A store is named by the content of the model. Because hashing the weights takes time, cache-ref also leaves a note
for each place a model was in: which store it led to, and the sizes and dates of the model's files. `train`
reads this note, and looks at the place again: a name may lead elsewhere today.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache.arrivals import REF_LOGPS
from cache.errors import CorruptError, StaleError, UsageError
from cache.files import TEMPORARY_PREFIX, read_with_digest, with_digest, write_json
from cache.fingerprint import differing_fields, fingerprint, short
from cache.names import check_name
from cache.ownership import remove_abandoned
from cache.ref_logps import RefLogps
from cache.safetensors import DECIDING, weight_files
from stages.cache_ref.places import Place, place_of, places_of
from stages.models.identity import reference_identity
from stages.models.loading import ModelSource, has_tokenizer, load_tokenizer
from stages.models.vocabulary import TokensInUse, vocabulary_sha256
from stages.runtime.compute import Compute
from stages.runtime.context import Context

DIGEST = "note_sha256"
NOTES = "by-place"


def store_of(source: ModelSource, compute: Compute, context: Context) -> RefLogps:
    """The store of this reference, found by the content of its weights; empty before the first run."""
    return _store(reference_identity(source, compute), source.short_name, context)


def open_reference(
    name: str, revision: str | None, used: TokensInUse, compute: Compute, context: Context
) -> RefLogps:
    """The store that cache-ref filled for this reference, found by the note it left; no weights are read.

    Weights that are gone are not missed, which is said. `used` are the tokens of the rows. Raises `StaleError` when there is
    no note, or when the model's files have changed since, and `UsageError` where the reference has other tokens.
    """
    for place in places_of(name, revision):
        path = _note_path(place, compute, context)
        if path.is_file():
            note = _read_note(path, context)
            context.store.bring(REF_LOGPS, note["store"])
            _compare_files(name, place, note["files"], context)
            if note["vocabulary"] != vocabulary_sha256(used.tokenizer):
                _compare_tokens(name, place, note, used, context)
            return RefLogps(context.store.root / REF_LOGPS / note["store"], note["identity"])
    raise _no_store(name, compute, context)


def open_start(source: ModelSource, start: dict[str, Any], compute: Compute, context: Context) -> RefLogps:
    """The store of the policy's own starting weights, which `start` identifies.

    Raises `StaleError` when there is none, naming the fields in which the model differs from the one that cache-ref
    found in its place.
    """
    reference = _store(start, source.short_name, context)
    if reference.folder.is_dir():
        return reference
    path = _note_path(place_of(source), compute, context)
    if not path.is_file():
        raise _no_store(source.name, compute, context)
    note = _read_note(path, context)
    if note["identity"] == start:  # its store was deleted
        raise _no_store(source.name, compute, context)
    raise StaleError(
        f"The cached reference log-probs in {context.store.root / REF_LOGPS / note['store']} are not of the policy's own "
        f"starting weights: {'; '.join(differing_fields(note['identity'], start))}. Run: {context.command('cache-ref')}"
    )


def remember_store(source: ModelSource, compute: Compute, reference: RefLogps, context: Context) -> None:
    """Note which store the place of this model led to, for `open_reference`; write the store's manifest if it is gone."""
    note = {
        "model": source.name,
        "place": place_of(source).identity,
        "files": _stat_files(source.folder, [path.name for path in weight_files(source.folder)]),
        "store": reference.folder.name,
        "identity": reference.identity,
        "vocabulary": vocabulary_sha256(load_tokenizer(source)) if has_tokenizer(source.folder) else None,
    }
    reference.write_manifest()
    context.store.send(reference.folder)
    path, note = _note_path(place_of(source), compute, context), with_digest(note, DIGEST)
    try:
        if path.is_file() and read_with_digest(path, DIGEST, "") == note:
            return
    except CorruptError:  # the note is written anew
        pass
    remove_abandoned(path.parent, TEMPORARY_PREFIX)
    write_json(path, note)
    context.store.send_note(path)


def notes_of(store: Path) -> list[Path]:
    """The notes that lead to a store of reference log-probs."""
    found = []
    for path in sorted((store.parent / NOTES).glob("*.json")):
        note = read_with_digest(
            path, DIGEST, "Delete it and run `align cache-ref` again: no row is scored again."
        )
        if note["store"] == store.name:
            found.append(path)
    return found


def check_note(path: Path, where: str) -> None:
    """Raise `CorruptError` for a note from elsewhere that is not under its own name or leads out of the store's folder."""
    note = read_with_digest(path, DIGEST, f"Export or copy {where} again.")
    try:
        key = fingerprint({"place": note["place"], "dtype": note["identity"]["dtype"]})
        is_whole = path.name == f"{short(key)}.json" and note["store"].endswith(
            f"-{short(fingerprint(note['identity']))}"
        )
        check_name(note["store"], where)
        is_whole = (
            is_whole and "/" not in note["store"] and isinstance(note["files"], dict) and "vocabulary" in note
        )
    except (KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise CorruptError(f"{where}: {NOTES}/{path.name} is no note of `align cache-ref`.")


def check_tokens(used: TokensInUse, source: ModelSource, context: Context) -> None:
    """Raise `UsageError` if the rows' tokens are others to the reference."""
    remedy = "Its log-probs of these rows mean nothing; use a reference with the policy's tokenizer: --set reference.model=NAME"
    used.check(source, "The reference", remedy, context.log)


def _compare_tokens(
    name: str, place: Place, note: dict[str, Any], used: TokensInUse, context: Context
) -> None:
    """The same for a reference whose weights may be gone, and its tokenizer with them."""
    if place.folder is not None and has_tokenizer(place.folder):
        check_tokens(used, ModelSource(name, place.folder), context)
    elif note["vocabulary"] is not None:
        raise UsageError(
            f"The reference {name} has another vocabulary than {used.tokenizer.name_or_path}, and its tokenizer is gone, so "
            f"they cannot be compared. Put its tokenizer back, or use another reference: --set reference.model=NAME"
        )


def _store(identity: dict[str, Any], name: str, context: Context) -> RefLogps:
    root, digits = context.store.root / REF_LOGPS, short(fingerprint(identity))
    context.store.bring(REF_LOGPS, f"*-{digits}")
    # The content decides, whatever name the model was first cached under.
    folder = next(iter(sorted(root.glob(f"*-{digits}"))), root / f"{name}-{digits}")
    return RefLogps(folder, identity)


def _no_store(name: str, compute: Compute, context: Context) -> StaleError:
    return StaleError(
        f"No reference log-probs of {name} in {compute.arithmetic} are in {context.store.root}. "
        f"Make them with: {context.command('cache-ref')}"
    )


def _compare_files(name: str, place: Place, noted: dict[str, list[int]], context: Context) -> None:
    """Compare today's files with the noted ones, by size and dates."""
    now = {} if place.folder is None else _stat_files(place.folder, noted)
    changed = sorted(file for file in now if now[file] != noted.get(file))
    if changed:
        raise StaleError(
            f"The files of the model {name} in {place.folder} are not those whose log-probs were cached (size or date of "
            f"{', '.join(changed)}). Compare their content, and score again only where it changed, with: "
            f"{context.command('cache-ref')}"
        )
    if now != noted:
        gone = ", ".join(sorted(noted.keys() - now))
        context.log(f"The reference {name} is gone ({gone}); its stored log-probs are used as they are.")


def _read_note(path: Path, context: Context) -> dict[str, Any]:
    command = context.command("cache-ref")
    note = read_with_digest(
        path, DIGEST, f"Delete it and run: {command} (it is written again, and no row is scored again)"
    )
    check_name(note["store"], str(path))
    return note


def _note_path(place: Place, compute: Compute, context: Context) -> Path:
    key = fingerprint({"place": place.identity, "dtype": compute.arithmetic})
    path = context.store.root / REF_LOGPS / NOTES / f"{short(key)}.json"
    context.store.bring_file(path)
    return path


def _stat_files(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size, modification and change time (ns) of those of the named and the deciding files that are there."""
    paths = [folder / name for name in sorted({*names, *DECIDING})]
    return {
        path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for path in paths
        if path.is_file()
    }
