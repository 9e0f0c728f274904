"""`align show`: one artifact, what it was made from, and what was made from it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.commands.command import Command

LATEST = "latest"

if TYPE_CHECKING:
    from pipeline.catalogue.entries import Catalogue, Entry
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Shown:
    """One artifact in its store."""

    catalogue: "Catalogue"
    entry: "Entry"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "path": str(self.entry.path),
            "manifest": dict(self.entry.manifest),
            "made_from": [other.place for other in self.catalogue.inputs(self.entry)],
            "data": self.catalogue.data_files(self.entry),
            "used_by": [other.place for other in self.catalogue.consumers(self.entry)],
        }

    def show(self, console: Console) -> None:
        """Print it with its inputs up to the data file and its consumers."""
        from pipeline.catalogue.terminal import show_entry

        show_entry(console, self.catalogue, self.entry)


def show(
    inputs: "Inputs",
    artifact: Annotated[
        str, typer.Argument(help="A folder, a run's name, `latest`, or the beginning of a name.")
    ] = LATEST,
) -> Shown:
    """Show one artifact: its identity, its inputs up to the data file, its results, and what was made from it."""
    from pipeline.catalogue.names import entry_named

    return Shown(*entry_named(inputs.context.store.root, artifact))


SHOW = Command("show", show, examples=("align show latest", "align show policy/latest"), takes_loss=False)
