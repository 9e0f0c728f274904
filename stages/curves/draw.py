"""Charts drawn by matplotlib: SVG whose colours are those of the page it stands in, and PNG.

In: runs, each with a label and the lines of its `metrics.jsonl`. Out: text or bytes; the same input gives the same bytes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.curves.charts import Chart, Line, points, smoothed, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour blindness tell apart, without its yellow and its light blue, which
# fade on white. The dash differs too, for print and for more runs than colours.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#a8558a", "#8a6d00", "#555555")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, FAINT = "#1c2024", "#8b9298"
# Most points of a line in a picture: more are not seen, and make the page large.
MOST_POINTS = 400
MOST_NAMED = 16  # runs in the legend of a PNG


@dataclass(frozen=True)
class DrawnRun:
    """A run in a picture. `heldout` is its number of held-out examples, 0 if it is not known; `style` its colour and dash."""

    label: str
    lines: Sequence[Line]
    heldout: int = 0
    style: int = 0

    @property
    def color(self) -> str:
        """One of the palette's."""
        return PALETTE[self.style % len(PALETTE)]

    @property
    def dash(self) -> Any:
        """A dash, another one each time the colours are used up."""
        return DASHES[self.style // len(PALETTE) % len(DASHES)]


def svg(chart: Chart, runs: Sequence[DrawnRun]) -> str:
    """A chart as an SVG element: its lines have the classes `run-0`, `run-1`, ..., its colours are CSS variables."""
    figure = _figure((4.6, 2.7))
    axes = figure.subplots()
    draw_chart(axes, chart, runs)
    figure.subplots_adjust(left=0.14, right=0.985, top=0.97, bottom=0.17)
    target = io.StringIO()
    with _settings():
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'id="([^"]*-run-(\d+)-\w+)"', r'class="run-\2"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # they would be the same in every picture of a page
    for place, color in enumerate(PALETTE):
        text = text.replace(color, f"var(--run-{place})")
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"', rf'<svg role="img" aria-label="{chart.title}" \1', text, count=1
    )


def png(charts: Sequence[Chart], runs: Sequence[DrawnRun], columns: int = 2, legend: bool = True) -> bytes:
    """Charts as one picture, with a legend below them."""
    target = io.BytesIO()
    with _settings():
        picture(charts, runs, columns, legend).savefig(
            target, format="png", dpi=110, facecolor="white", metadata={"Software": None}
        )
    return target.getvalue()


def picture(
    charts: Sequence[Chart], runs: Sequence[DrawnRun], columns: int = 2, legend: bool = True
) -> "Figure":
    """Charts as one figure of matplotlib, with a legend below them."""
    charts = [chart for chart in charts if has_points(chart, runs)]
    rows = max(1, -(-len(charts) // columns))
    below = 0.2 * min(len({run.label for run in runs}), MOST_NAMED) + 0.1 if legend else 0.0
    height = 2.5 * rows + below
    figure = _figure((4.3 * columns, height))
    for place, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw_chart(axes, chart, runs)
        axes.set_title(chart.title, loc="left", fontsize=9)
    figure.subplots_adjust(
        left=0.16 / columns, right=0.985, top=1 - 0.3 / height, bottom=(below + 0.4) / height, hspace=0.42, wspace=0.22
    )  # fmt: skip
    if legend and runs:
        _legend(figure, runs)
    return figure


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def _settings() -> Any:
    import matplotlib as mpl

    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "align", "svg.id": None})


def _legend(figure: "Figure", runs: Sequence[DrawnRun]) -> None:
    from matplotlib.lines import Line2D

    shown: dict[str, DrawnRun] = {}
    for run in runs:
        shown.setdefault(run.label, run)
    handles = [Line2D([], [], color=run.color, linestyle=run.dash, label=run.label) for run in shown.values()]
    figure.legend(
        handles=handles[:MOST_NAMED], loc="lower left", bbox_to_anchor=(0.03, 0), fontsize=8, frameon=False, labelcolor=INK
    )  # fmt: skip


def has_points(chart: Chart, runs: Sequence[DrawnRun]) -> bool:
    """Whether any run has a value for the chart."""
    return any(points(run.lines, chart.metric)[0] for run in runs)


def draw_chart(axes: "Axes", chart: Chart, runs: Sequence[DrawnRun]) -> None:
    """Draw every run that has values."""
    for place, run in enumerate(runs):
        steps, values = points(run.lines, chart.metric)
        if not steps:
            continue
        if chart.training is not None:
            faint = _thinned(*smoothed(points(run.lines, chart.training)))
            axes.plot(*faint, color=run.color, alpha=0.35, linewidth=0.9, gid=f"{chart.name}-run-{place}-t")
        if chart.name == "accuracy" and run.heldout and len(runs) <= len(PALETTE):
            low, high = zip(*(wilson(value, run.heldout) for value in values), strict=True)
            band = axes.fill_between(steps, low, high, color=run.color, alpha=0.12, linewidth=0)
            band.set_gid(f"{chart.name}-run-{place}-b")
        marker = "o" if chart.is_line_of_evaluations else None
        axes.plot(
            *_thinned(steps, values), color=run.color, linestyle=run.dash, linewidth=1.6, marker=marker,
            markersize=2.8, gid=f"{chart.name}-run-{place}-l",
        )  # fmt: skip
    if chart.name == "accuracy":
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
    _dress(axes, chart)


def _dress(axes: "Axes", chart: Chart) -> None:
    if chart.log and any(value > 0 for line in axes.lines for value in line.get_ydata()):  # type: ignore[union-attr]
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.yaxis.get_offset_text().set(color=FAINT, fontsize=8)
    axes.set_xlabel("step", fontsize=8, color=FAINT)
    axes.tick_params(which="both", labelsize=8, colors=FAINT, length=3)
    axes.grid(alpha=0.18, color=FAINT, linewidth=0.7)
    axes.margins(x=0.02)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
        spine.set_linewidth(0.7)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """Every n-th point and the last one."""
    every = -(-len(steps) // MOST_POINTS)
    if every <= 1:
        return steps, values
    last = [len(steps) - 1] if (len(steps) - 1) % every else []
    kept = [*range(0, len(steps), every), *last]
    return [steps[place] for place in kept], [values[place] for place in kept]
