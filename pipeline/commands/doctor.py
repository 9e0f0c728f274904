"""`align doctor`: checks this machine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from cache.errors import AlignError, MachineError
from pipeline.commands.command import Command, Given

if TYPE_CHECKING:
    from pipeline.doctor.finding import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Examined:
    """The findings, in the order of the topics."""

    findings: "Sequence[Finding]"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"findings": [asdict(finding) for finding in self.findings]}

    def show(self, console: Console) -> None:
        """Print a line for each finding."""
        from pipeline import tables

        topic = ""
        table = tables.labelled()
        table.columns[0].style = ""
        table.add_column(overflow="fold")
        for finding in self.findings:
            if finding.topic != topic:
                topic = finding.topic
                table.add_row(Text(topic, "bold"), "", "")
            found = Text(finding.found)
            if finding.advice:
                found.append(f"  → {finding.advice}", "cyan")
            state = Text(finding.state, STYLES[finding.state])
            table.add_row(state, Text(finding.name, no_wrap=True), found)
        console.print(table)

    @property
    def failure(self) -> AlignError | None:
        """The error that ends the command where a stage cannot run."""
        names = [finding.name for finding in self.findings if finding.state == "problem"]
        if not names:
            return None
        return MachineError(
            f"align cannot run like this: {', '.join(names)}. Do what stands behind the arrows."
        )


def doctor(given: Given) -> Examined:
    """Check this machine: versions, packages that clash, GPUs, the disk of the store, logins.

    A note is no fault. Tokens are never shown. Ends with exit code 6 where a stage cannot run.
    """
    from pipeline.doctor.accelerator import gpus
    from pipeline.doctor.disk import disk
    from pipeline.doctor.logins import logins
    from pipeline.doctor.packages import packages

    return Examined([*packages(), *gpus(), *disk(given.store), *logins()])


DOCTOR = Command(
    "doctor",
    doctor,
    examples=("align doctor", "align doctor --store /data/artifacts --json"),
    takes_loss=False,
    without_config=("store", "json_", "quiet", "debug"),
)
