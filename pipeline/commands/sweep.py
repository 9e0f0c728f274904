"""`align sweep`: many trainings from one store, ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from pipeline.commands.command import Command, Intent, On, flag

if TYPE_CHECKING:
    from cache.errors import AlignError
    from pipeline.inputs import Inputs
    from pipeline.sweep.sweep import Sweep


@dataclass(frozen=True)
class Listed:
    """The command lines of the trainings."""

    lines: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"commands": list(self.lines)}

    def show(self, console: Console) -> None:
        """Print one command a line and nothing else."""
        for line in self.lines:
            console.print(line, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Swept:
    """The trainings, ranked. `failure` is the error that the command ends with."""

    found: "Sweep"

    @property
    def failure(self) -> "AlignError | None":
        """The error if a training failed."""
        return self.found.failure

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        from pipeline.sweep.sweep import as_json

        return as_json(self.found)

    def show(self, console: Console) -> None:
        """Print the ranked table."""
        from pipeline.sweep.terminal import show_sweep

        show_sweep(console, self.found)


def sweep(
    inputs: "Inputs",
    list_: Annotated[
        bool, flag("--list", "Print one `align train` command a line, for a job array, and run nothing.")
    ] = False,
    on: On = None,
) -> Swept | Listed:
    """Train every combination of the keys in the block sweep, from one store, and rank the results.

    Trainings that are done are skipped, one that fails leaves the others alone. Ends with the exit code of the first that failed.
    """
    from pipeline.sweep.members import members_of

    if list_:
        return Listed([member.command(inputs.context.arguments) for member in members_of(inputs.config)])
    from pipeline.sweep.picture import draw
    from pipeline.sweep.sweep import sweep as run_all
    from pipeline.sweep.sweep import write_results

    found = run_all(inputs, on)
    write_results(found)
    draw(found)
    return Swept(found)


def would_sweep(inputs: "Inputs", list_: bool = False, on: str | None = None) -> Intent:
    """Count the trainings."""
    from pipeline.sweep.members import members_of

    members = members_of(inputs.config)
    return Intent("train and rank", {"trainings": len(members), "keys": list(inputs.config.sweep.keys)})


SWEEP = Command(
    "sweep",
    sweep,
    examples=(
        "align sweep -c configs/sweep-simpo.yaml",
        "align sweep -c configs/sweep-orpo.yaml --list",
        "align sweep -c configs/sweep-kto.yaml --on ray:auto",
    ),
    intent=would_sweep,
    reads_data=True,
)
