"""`align report`: training runs as one page, one picture, or curves in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pipeline.commands.command import Command, flag

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from pipeline.report.runs import ReportedRun

PAGE = Path("report.html")


@dataclass(frozen=True)
class Reported:
    """The runs, the files written, and whether the curves are printed."""

    runs: "Sequence[ReportedRun]"
    files: Sequence[Path]
    in_terminal: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, without the curves."""
        runs = [
            {"run": str(run.folder), "label": run.label, "final": run.counts.get("final")}
            for run in self.runs
        ]
        return {"files": [str(path) for path in self.files], "runs": runs}

    def show(self, console: Console) -> None:
        """Print the curves if asked for, and the files."""
        from pipeline.report.terminal import show_runs

        if self.in_terminal:
            show_runs(console, self.runs)
        for path in self.files:
            console.print(
                Text.assemble(("report", "bold"), f"  {len(self.runs)} runs: {path}"), soft_wrap=True
            )


def report(
    inputs: "Inputs",
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Policies by folder or name, unfinished trainings, sweeps. Default: the policy of the configuration.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The HTML page. Default: report.html."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write the main curves as a picture.")
    ] = None,
    terminal: Annotated[bool, flag("--terminal", "Draw the curves in the terminal.")] = False,
    by: Annotated[
        str | None,
        typer.Option(
            "--by", metavar="KEY", help="A colour for each value of this key, e.g. loss.name, loss.beta."
        ),
    ] = None,
) -> Reported:
    """Show training runs over each other: curves, data, cache, speed, completions, settings and what differs.

    Writes one HTML page without external files unless only --terminal or --png is given.
    """
    import shlex

    from cache.files import write_bytes
    from pipeline.catalogue.names import folder_of
    from pipeline.report.page import page
    from pipeline.report.runs import open_runs
    from stages.curves.charts import MAIN
    from stages.curves.draw import png as draw

    root = inputs.context.store.root
    folders = [folder_of(root, run, ("policy",)) for run in runs or []]
    found = open_runs(folders or [inputs.policy_artifact.path], by)
    files = []
    if output is not None or not (terminal or png):
        command = shlex.join(["align", "report", *(runs or []), *(["--by", by] if by else [])])
        files.append(output or PAGE)
        write_bytes(files[-1], page(found, command).encode())
    if png is not None:
        write_bytes(png, draw(MAIN, [run.drawn for run in found]))
        files.append(png)
    return Reported(found, files, terminal)


REPORT = Command(
    "report",
    report,
    examples=(
        "align report artifacts/policy/A artifacts/policy/B -o report.html",
        "align report artifacts/sweeps/NAME --by loss.beta",
        "align report --terminal",
    ),
)
