"""`align diff`: what differs between two artifacts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.commands.command import Command

if TYPE_CHECKING:
    from pipeline.catalogue.differences import Difference
    from pipeline.catalogue.entries import Entry
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Compared:
    """Two artifacts, and the keys that differ: settings, identity beyond them, results."""

    one: "Entry"
    other: "Entry"
    parts: "Mapping[str, Sequence[Difference]]"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        parts = {
            title: {line.key: [line.one, line.other] for line in found} for title, found in self.parts.items()
        }
        return {"a": str(self.one.path), "b": str(self.other.path), **parts}

    def show(self, console: Console) -> None:
        """Print the keys with both values."""
        from pipeline.catalogue.terminal import show_differences

        show_differences(
            console, self.one, self.other, {title: list(found) for title, found in self.parts.items()}
        )


def diff(
    inputs: "Inputs",
    one: Annotated[
        str | None,
        typer.Argument(
            metavar="[A]",
            help="A folder, a run's name, `latest`, or the beginning of a name. Default: the two newest policies.",
        ),
    ] = None,
    other: Annotated[
        str | None, typer.Argument(metavar="[B]", help="The same. Default: the newest policy.")
    ] = None,
) -> Compared:
    """Show which settings and which results of two artifacts differ."""
    from cache.errors import UsageError
    from pipeline.catalogue.differences import differences
    from pipeline.catalogue.entries import Catalogue
    from pipeline.catalogue.names import entry_named

    root = inputs.context.store.root
    if one is None:
        newest = [entry for entry in Catalogue(root).entries if entry.kind == "policy"][-2:]
        if len(newest) < 2:
            raise UsageError(f"There are fewer than two policies in {root}. Name two artifacts.")
        first, second = newest
    else:
        (_, first), (_, second) = entry_named(root, one), entry_named(root, other or "policy/latest")
    return Compared(first, second, differences(first, second))


DIFF = Command(
    "diff",
    diff,
    examples=("align diff my-first-run latest", "align diff policy/A policy/B"),
    takes_loss=False,
)
