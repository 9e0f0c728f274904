"""`align gc`: deletes what nothing in the store refers to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, flag

if TYPE_CHECKING:
    from pipeline.catalogue.unused import Unused
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Collected:
    """What nothing refers to, and whether it was deleted."""

    found: "Sequence[Unused]"
    deleted: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        found = [
            {"path": str(one.path), "kind": one.kind, "reason": one.reason, "bytes": one.num_bytes}
            for one in self.found
        ]
        return {"deleted": self.deleted, "unused": found}

    def show(self, console: Console) -> None:
        """Print a line for each folder."""
        for one in self.found:
            line = f"  {one.kind}/{one.path.name}  {tables.size(one.num_bytes)}  {one.reason}"
            console.print(Text(line), soft_wrap=True)
        total = tables.size(sum(one.num_bytes for one in self.found))
        if not self.found:
            console.print("gc: nothing is unused")
        elif self.deleted:
            console.print(f"gc: deleted {len(self.found)} folders, {total}")
        else:
            console.print(
                f"gc: would delete {len(self.found)} folders, {total}. Delete them with: align gc --yes"
            )


def gc(
    inputs: "Inputs",
    yes: Annotated[bool, flag("--yes", "Delete them; without it they are only listed.")] = False,
) -> Collected:
    """List prepared rows and reference log-probs that no training or completion refers to, and leftovers of killed processes.

    Policies, completions and verdicts are results and stay. Deletes nothing without --yes.
    """
    from pipeline.catalogue.entries import Catalogue
    from pipeline.catalogue.unused import delete, unused

    root = inputs.context.store.root
    found = unused(Catalogue(root))
    if yes:
        delete(root, found)
    return Collected(found, yes)


GC = Command("gc", gc, examples=("align gc", "align gc --yes"), takes_loss=False)
