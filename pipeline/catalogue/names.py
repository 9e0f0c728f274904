"""Names for artifacts where a folder is asked for: a run's name, `latest`, or as much of a name as is unique.

In: what was typed. Out: a folder. A path that exists is always meant as such.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from cache.artifacts import MANIFEST
from cache.errors import UsageError
from pipeline.catalogue.entries import KINDS, Catalogue, Entry
from pipeline.config import RunConfig

LATEST = "latest"
FEWEST_DIGITS = 4  # of a fingerprint
SHOWN = 5


def folder_of(root: Path, text: str | Path, kinds: Sequence[str] = KINDS) -> Path:
    """The folder that `text` names: a path, or an artifact of one of `kinds` in the store at `root`; raises `UsageError`."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    known, found = _named(root, text, kinds)
    if len(found) == 1:
        return found[0].path
    if found:
        names = ", ".join(entry.place for entry in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise UsageError(f"{text} may mean {len(found)} artifacts: {names}. Type more of the name.")
    raise UsageError(
        f"{text}: no such path, and no {' or '.join(kinds)} in {root} has this name. {_hint(known, str(text))}"
    )


def folder_or_path(root: Path, text: str | Path, kinds: Sequence[str] = KINDS) -> Path:
    """As `folder_of`, but the path as typed where no artifact has the name: its reader says best what it expected."""
    path = Path(text).expanduser()
    return path if path.exists() or not _named(root, text, kinds)[1] else folder_of(root, text, kinds)


def _named(root: Path, text: str | Path, kinds: Sequence[str]) -> tuple[list[Entry], list[Entry]]:
    """The artifacts of these kinds in the store at `root`, and those of them that `text` names."""
    catalogue = Catalogue(root)
    known = [entry for entry in catalogue.entries if entry.kind in kinds]
    return known, _matches(catalogue, known, str(text))


def entry_named(root: Path, text: str) -> tuple[Catalogue, Entry]:
    """The artifact that `text` names, in the catalogue of its store; raises `UsageError`."""
    folder = folder_of(root, text).resolve()
    catalogue = Catalogue(folder.parent.parent if (folder / MANIFEST).is_file() else root)
    found = [entry for entry in catalogue.entries if entry.path.resolve() == folder]
    if not found:
        raise UsageError(f"{text} is no artifact. `align ls` lists what there is.")
    return catalogue, found[0]


def _hint(known: Sequence[Entry], text: str) -> str:
    names = [name for entry in known for name in (entry.run_name, entry.name) if name]
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else "`align ls` lists what there is."


def _matches(catalogue: Catalogue, known: Sequence[Entry], text: str) -> list[Entry]:
    """The entries that `text` names, by the first way of naming that finds any."""
    kind, slash, rest = text.partition("/")
    if slash and kind in KINDS:
        known, text = [entry for entry in known if entry.kind == kind], rest
    if text == LATEST:
        return [max(known, key=lambda entry: (entry.created, entry.path.stat().st_mtime_ns))] if known else []
    ways = (
        lambda entry: entry.name == text,
        lambda entry: entry.run_name == text,
        lambda entry: text in catalogue.run_names(entry),
        lambda entry: entry.name.startswith(text),
        lambda entry: len(text) >= FEWEST_DIGITS and entry.fingerprint.startswith(text),
    )
    found = next((found for way in ways if (found := [entry for entry in known if way(entry)])), [])
    # What was made of a policy is named after it; the beginning of both names means the policy.
    shortest = min(found, key=lambda entry: len(entry.name), default=None)
    if shortest and all(other is shortest or other.name.startswith(f"{shortest.name}-") for other in found):
        return [shortest]
    return found


# Keys that hold a folder, and the kinds it may be. Models may also be named as on the hub, where a name such as `gpt2`
# could be the beginning of an artifact's, so that these keys want the kind before a part of a name.
MODEL_KEYS = (("eval", "model"), ("sample", "model"), ("judge", "implicit_model"))
FOLDER_KEYS = ((("train", "resume"), ("policy",)), (("train", "begin_from"), ("policy",)), (("judge", "baseline"), ("completions",)))  # fmt: skip
MODELS = ("policy", "merged")


def with_folders(config: RunConfig, root: Path) -> RunConfig:
    """The configuration with names of artifacts replaced by their folders."""
    for block, key in MODEL_KEYS:
        text = getattr(getattr(config, block), key)
        if text is not None and not Path(text).expanduser().exists():
            config = _replaced(config, block, key, _model(root, text))
    for (block, key), kinds in FOLDER_KEYS:
        text = getattr(getattr(config, block), key)
        if text is not None and not Path(text).expanduser().exists():
            config = _replaced(config, block, key, str(folder_or_path(root, text, kinds)))
    return config


def _model(root: Path, text: str) -> str:
    """The folder of a policy that is named beyond doubt, else the text, which may be a name on the hub."""
    catalogue = Catalogue(root)
    known = [entry for entry in catalogue.entries if entry.kind in MODELS]
    whole = [entry for entry in known if text in (entry.name, entry.run_name)]
    if text == LATEST or text.partition("/")[0] in MODELS or whole:
        return str(folder_of(root, text, MODELS))
    return text


def _replaced(config: RunConfig, block: str, key: str, value: str) -> RunConfig:
    settings = getattr(config, block).model_copy(update={key: value})
    return config.model_copy(update={block: settings})
