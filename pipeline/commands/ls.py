"""`align ls`: lists the artifacts of the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.commands.command import Command

if TYPE_CHECKING:
    from pipeline.catalogue.entries import Catalogue, Entry, Unfinished
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Listing:
    """Artifacts, and folders that no manifest ends."""

    catalogue: "Catalogue"
    entries: "Sequence[Entry]"
    unfinished: "Sequence[Unfinished]"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        artifacts = [
            {
                "kind": entry.kind,
                "name": entry.name,
                "run": entry.run_name,
                "path": str(entry.path),
                "fingerprint": entry.fingerprint,
                "created": entry.created.isoformat(),
                "bytes": entry.num_bytes,
                "made_from": [other.place for other in self.catalogue.inputs(entry)],
                "data": self.catalogue.data_files(entry),
            }
            for entry in self.entries
        ]
        unfinished = [
            {
                "kind": one.kind,
                "path": str(one.path),
                "being_written": one.is_written,
                "checkpoint_step": one.step,
            }
            for one in self.unfinished
        ]
        return {"artifacts": artifacts, "unfinished": unfinished}

    def show(self, console: Console) -> None:
        """Print a line for each."""
        from pipeline.catalogue.terminal import show_list

        show_list(console, self.catalogue, self.entries, self.unfinished)


def ls(
    inputs: "Inputs",
    kind: Annotated[
        str | None, typer.Argument(help="rows, ref-logps, policy, completions, verdicts, ... Default: all.")
    ] = None,
) -> Listing:
    """List the artifacts of the store: kind, name, age, size, and what they were made from."""
    from cache.errors import UsageError
    from pipeline.catalogue.entries import KINDS, Catalogue

    if kind is not None and kind not in KINDS:
        raise UsageError(f"{kind} is no kind of artifact; expected one of {', '.join(KINDS)}.")
    catalogue = Catalogue(inputs.context.store.root)
    return Listing(
        catalogue,
        [entry for entry in catalogue.entries if kind in (None, entry.kind)],
        [one for one in catalogue.unfinished if kind in (None, one.kind)],
    )


LS = Command("ls", ls, examples=("align ls", "align ls policy --json"), takes_loss=False)
