"""Charts drawn with characters, for a terminal or a log.

In: runs, and the width of the terminal. Out: text with colours as terminals understand them.
"""

from collections.abc import Sequence
from typing import Any

from stages.curves.charts import Chart, points, smoothed
from stages.curves.draw import PALETTE, DrawnRun, has_points

HEIGHT = 13  # lines of a chart
NARROWEST = 38  # characters of a chart; two stand side by side where there is room
NUM_TICKS = 4
# Colours of 256-colour terminals nearest to the palette's.
COLORS = (32, 166, 36, 133, 136, 244)


def drawing(charts: Sequence[Chart], runs: Sequence[DrawnRun], width: int) -> str:
    """The charts that any run has values for, one below the other or two in a line."""
    from plotext import figure

    charts = [chart for chart in charts if has_points(chart, runs)]
    columns = max(1, min(2, len(charts), width // NARROWEST))
    blocks: list[str] = []
    for start in range(0, len(charts), columns):
        line = charts[start : start + columns]
        figure.clear()
        if len(line) > 1:
            figure.subplots(1, len(line))
        figure.plot_size(width * len(line) // columns, HEIGHT)
        for place, chart in enumerate(line, start=1):
            _draw(figure.subplot(1, place) if len(line) > 1 else figure, chart, runs)
        blocks.append(str(figure.build().string()))
    return "\n".join(blocks)


def color_of(run: DrawnRun) -> int:
    """The number of the run's colour on a terminal."""
    return COLORS[run.style % len(PALETTE)]


def _draw(axes: Any, chart: Chart, runs: Sequence[DrawnRun]) -> None:
    from plotext import marker, pixel

    axes.theme("colorless")
    axes.title(chart.title)
    axes.legend(False)
    last = 0
    for run in runs:
        found = points(run.lines, chart.metric)
        steps, values = found if chart.is_line_of_evaluations else smoothed(found)
        if steps:
            dots = marker("braille", pixel=pixel(foreground=color_of(run)))
            axes.draw(axes.signal(steps, values, marker=dots).lines(True))
            last = max(last, steps[-1])
    ticks = sorted({round(last * part / NUM_TICKS) for part in range(NUM_TICKS + 1)})
    axes.ruler(0, 0).ticks(ticks, [str(tick) for tick in ticks])
