"""What of a store can be deleted because nothing refers to it: prepared rows, reference log-probs, and leftovers.

In: a catalogue. Out: what is unused, with the reason. Policies, completions and verdicts are results and are never unused. An
interrupted training, which continues from its checkpoint, refers to its rows and log-probs as a finished one does.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import BusyError
from cache.files import TEMPORARY_PREFIX, read_json
from cache.ownership import temporary_suffix
from pipeline.catalogue.entries import Catalogue, folder_bytes

MADE_ON_THE_WAY = ("rows", "row-shares", "online-rows", "ref-logps")


@dataclass(frozen=True)
class Unused:
    """A folder that can go."""

    path: Path
    kind: str
    reason: str
    num_bytes: int


def unused(catalogue: Catalogue) -> list[Unused]:
    """Everything that nothing refers to; raises `BusyError` while something is being written into the store."""
    busy = [one for one in catalogue.unfinished if one.is_written]
    if busy:
        raise BusyError(
            f"A process is writing {busy[0].path}, and what it will refer to is not known yet. Type the same command again when "
            f"it has ended."
        )
    found = [
        Unused(entry.path, entry.kind, "nothing was made from it", entry.num_bytes)
        for entry in catalogue.entries
        if entry.kind in MADE_ON_THE_WAY and entry.fingerprint and not catalogue.consumers(entry)
        and not any(entry.fingerprint in one.mentioned for one in catalogue.unfinished)
    ]  # fmt: skip
    found += [
        Unused(
            one.path, one.kind, "left by a process that ended, without a checkpoint", folder_bytes(one.path)
        )
        for one in catalogue.unfinished
        if one.step is None
    ]
    return found


def delete(root: Path, found: Sequence[Unused]) -> None:
    """Delete the folders, each at once: an interrupt leaves no half artifact under its name. Notes of a deleted store go too."""
    for one in found:
        doomed = one.path.with_name(f"{TEMPORARY_PREFIX}deleted.{temporary_suffix()}")
        one.path.rename(doomed)
        shutil.rmtree(doomed)
    gone = {one.path.name for one in found if one.kind == "ref-logps"}
    for note in (root / "ref-logps" / "by-place").glob("*.json") if gone else ():
        if read_json(note).get("store") in gone:
            note.unlink()
