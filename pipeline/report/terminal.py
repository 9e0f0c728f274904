"""Training runs in a terminal: curves, the colours of the runs, metrics at the end."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pipeline import tables
from pipeline.report.runs import ReportedRun
from stages.curves.charts import CHARTS, Chart
from stages.curves.draw import DrawnRun
from stages.curves.terminal import color_of, drawing

WIDEST = 120
FINAL = (
    ("eval/rewards/accuracies", "accuracy"),
    ("eval/rewards/margins", "margin"),
    ("eval/loss", "loss"),
    ("logps_change/chosen", "chosen"),
    ("logps_change/rejected", "rejected"),
    ("eval/length_bias", "length bias"),
)


def show_curves(console: Console, charts: Sequence[Chart], runs: Sequence[DrawnRun]) -> None:
    """Print the charts, and a legend where there are several runs."""
    text = drawing(charts, runs, min(console.width, WIDEST))
    console.print(Text.from_ansi(text), soft_wrap=True)
    for run in runs if len(runs) > 1 else ():
        console.print(Text.assemble(("  ── ", f"color({color_of(run)})"), run.label), soft_wrap=True)


def show_runs(console: Console, runs: Sequence[ReportedRun]) -> None:
    """Print all curves, then a line for each run."""
    show_curves(console, CHARTS, [run.drawn for run in runs])
    metrics = [(name, title) for name, title in FINAL if any(run.last(name) is not None for run in runs)]
    table = tables.columns("at the end", "steps", *(title for _, title in metrics))
    for run in runs:
        values = [run.last(name) for name, _ in metrics]
        steps = f"{run.lines[-1]['step']:,}" if run.lines else ""
        table.add_row(run.label, steps, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
