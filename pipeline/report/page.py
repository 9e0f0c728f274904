"""Training runs as one HTML page without external files or scripts: curves, figures, data, cache, samples, settings.

Colours are CSS variables, so that curves follow the light or dark theme of the reader, and a checkbox for each run hides it in
every chart.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from pipeline import yaml_1_2
from pipeline.html_page import document
from pipeline.inspect.page import CHART_STYLE
from pipeline.report.cards import cache_cards, data_cards, final_table, speed_table
from pipeline.report.html_table import wide
from pipeline.report.runs import ReportedRun, differences
from pipeline.sweep.members import shown
from stages.curves.charts import CHARTS, Chart, points
from stages.curves.draw import DASHES, PALETTE, has_points, svg

SHOWN_PROMPTS = 20
# The palette on a dark page: the same hues, lighter.
DARK = ("#56b4e9", "#f0894a", "#3fc79b", "#dd9cc6", "#d9b843", "#b5b5b5")
STYLE = """
:root { LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
.charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.charts .card { padding: .8rem .9rem .6rem; min-width: 0; } .charts h3, .card h3 { margin: 0 0 .3rem; font-size: .95rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.runs { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: .6rem .2rem; margin: .8rem 0 0;
  background: var(--paper); border: 0; border-bottom: 1px solid var(--line); font-size: .88rem; max-height: 40vh; overflow-y: auto; }
.runs label { display: inline-flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; cursor: pointer; min-height: 1.6rem; }
.runs svg { width: 2rem; flex: none; } .runs legend { float: left; padding: 0; color: var(--faint); margin-right: .4rem; }
input[type=checkbox] { width: 1.05rem; height: 1.05rem; accent-color: var(--prompt); }
:focus-visible { outline: 2px solid var(--prompt); outline-offset: 2px; }
.key { display: inline-block; width: 2rem; vertical-align: middle; margin-right: .4rem; } td .key svg { width: 2rem; }
.wide { overflow-x: auto; padding: .4rem 1.1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } thead th { border-top: 0; font-weight: 600; vertical-align: bottom; }
td.text { text-align: left; white-space: normal; min-width: 12rem; max-width: 26rem; overflow-wrap: anywhere; vertical-align: top; }
details { margin-top: .4rem; font-size: .85rem; } summary { cursor: pointer; color: var(--faint); }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: .4rem 0; }
.card + .card { margin-top: 0; } .stack > * { margin-bottom: .8rem; }
@media (max-width: 40rem) { body { padding: 1.2rem .7rem 3rem; } th, td { padding: .3rem .45rem; font-size: .8rem; } }
@media print { .runs { position: static; } }
"""


def page(runs: Sequence[ReportedRun], command: str) -> str:
    """The page as text; `command` is what was typed for it."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} training runs"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f'<h1>{escape(title)}</h1><p class="path">{made}. <code>{escape(command)}</code></p>',
        _checkboxes(runs),
        _section("At the end", final_table(runs, [key_of(run) for run in runs])),
        _section("Curves", _charts(runs)),
        _section("What differs", _differences(runs)) if len(runs) > 1 else "",
        _section("Data", data_cards(runs)),
        _section("Reference log-probs", cache_cards(runs)),
        _section("Speed", speed_table(runs)),
        _section("Completions", _completions(runs)),
        _section("Settings and commands", _settings(runs)),
    ]
    return document(title, CHART_STYLE + _style(len(runs)), "\n".join(parts))


def _style(number: int) -> str:
    light, dark = (
        " ".join(f"--run-{place}: {color};" for place, color in enumerate(colors))
        for colors in (PALETTE, DARK)
    )
    hidden = ", ".join(f"body:has(#show-{run}:not(:checked)) .run-{run}" for run in range(number))
    return (
        STYLE.replace("LIGHT", light).replace("{ DARK }", f"{{ {dark} }}")
        + f"{hidden} {{ display: none; }}\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def key_of(run: ReportedRun) -> str:
    """A short line in the colour and dash of a run."""
    dash = DASHES[run.style // len(PALETTE) % len(DASHES)]
    pattern = "" if dash == "-" else f' stroke-dasharray="{" ".join(str(2 * part) for part in dash[1])}"'
    color = f"var(--run-{run.style % len(PALETTE)})"
    return (
        '<span class="key"><svg viewBox="0 0 32 10" aria-hidden="true">'
        f'<path d="M0 5H32" stroke="{color}" stroke-width="3"{pattern}/></svg></span>'
    )


def _checkboxes(runs: Sequence[ReportedRun]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{place}" checked>{key_of(run)}{escape(run.label)}</label>'
        for place, run in enumerate(runs)
    )
    return f'<fieldset class="runs"><legend>Show</legend>{boxes}</fieldset>'


def _charts(runs: Sequence[ReportedRun]) -> str:
    drawn = [run.drawn for run in runs]
    shown_charts = [chart for chart in CHARTS if has_points(chart, drawn)]
    cards = "".join(
        f'<div class="card"><h3>{escape(chart.title)}</h3>{_named(svg(chart, drawn), runs)}'
        f'<p class="note">{escape(_note(chart))}</p>{_values(chart, runs)}</div>'
        for chart in shown_charts
    )
    return f'<div class="charts">{cards}</div>'


def _note(chart: Chart) -> str:
    faint = "Faint: the training steps, smoothed. " if chart.training else ""
    return f"{chart.note[:1].upper()}{chart.note[1:]}. {faint}".strip()


def _named(drawing: str, runs: Sequence[ReportedRun]) -> str:
    """The drawing with the label of its run on each line, which browsers show beside the pointer."""
    for place, run in enumerate(runs):
        name = f'<g class="run-{place}">'
        drawing = drawing.replace(name, f"{name}<title>{escape(run.label)}</title>")
    return drawing


def _values(chart: Chart, runs: Sequence[ReportedRun]) -> str:
    """The points of a held-out chart as a table, for those who cannot see it or want the numbers."""
    if not chart.is_line_of_evaluations:
        return ""
    columns = [dict(zip(*points(run.lines, chart.metric), strict=True)) for run in runs]
    steps = sorted({step for column in columns for step in column})
    rows = [[str(step), *(_number(column.get(step)) for column in columns)] for step in steps]
    heads = ["step", *(escape(run.label) for run in runs)]
    return f"<details><summary>Values</summary>{wide(heads, rows)}</details>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _differences(runs: Sequence[ReportedRun]) -> str:
    found = differences(runs)
    if not found:
        return '<p class="note">The settings are the same.</p>'
    rows = [
        [f"<code>{escape(key)}</code>", *("" if value is None else escape(shown(value)) for value in values)]
        for key, values in found.items()
    ]
    heads = ["setting", *(key_of(run) + escape(run.label) for run in runs)]
    return wide(heads, rows)


def _completions(runs: Sequence[ReportedRun]) -> str:
    by_run = {run.label: run.completions() for run in runs}
    with_some = {label: found for label, found in by_run.items() if found}
    if not with_some:
        return '<p class="note">None. `align sample`, or train.sample_steps, makes them.</p>'
    prompts = list(dict.fromkeys(prompt for found in with_some.values() for prompt in found))
    rows = [
        [escape(prompt), *(escape(found.get(prompt, "")) for found in with_some.values())]
        for prompt in prompts[:SHOWN_PROMPTS]
    ]
    more = (
        f'<p class="note">The first {SHOWN_PROMPTS} of {len(prompts):,} prompts.</p>'
        if len(prompts) > SHOWN_PROMPTS
        else ""
    )
    heads = ["prompt", *(escape(label) for label in with_some)]
    return f"{more}{wide(heads, rows, 'text')}"


def _settings(runs: Sequence[ReportedRun]) -> str:
    found = []
    for run in runs:
        config = escape(yaml_1_2.dump(dict(run.config))) if run.config else "not saved yet"
        typed = escape(str(run.provenance.get("command", "not finished")))
        again = escape(f"align train -c {run.folder / 'config.yaml'} --store {run.folder.parent.parent}")
        found.append(
            f'<div class="card"><h3>{key_of(run)}{escape(run.label)}</h3><p class="path">{escape(str(run.folder))}</p>'
            f"<details><summary>Commands</summary><pre>typed:  {typed}\nagain:  {again}</pre></details>"
            f"<details><summary>Configuration</summary><pre>{config}</pre></details></div>"
        )
    return f'<div class="stack">{"".join(found)}</div>'
