"""The table of a sweep: one line for each setting, best first, then what failed."""

import shlex

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tables
from pipeline.sweep.members import SEED, short_name, shown
from pipeline.sweep.ranking import ACCURACY, Ranking, Setting
from pipeline.sweep.sweep import START, WIN_RATE, Sweep

# Metric, heading, whether the spread over seeds is shown. A column without a value is left out.
COLUMNS = (
    (START, "at start", False),
    (ACCURACY, "accuracy", True),
    ("rewards/margins", "margin", True),
    (WIN_RATE, "win-rate", True),
    ("logps_change/chosen", "chosen", False),
    ("logps_change/rejected", "rejected", False),
    ("kl", "kl", False),
    ("length_bias", "length bias", False),
)


def show_sweep(console: Console, found: Sweep) -> None:
    """Print the ranking, its verdict, what failed, and what the cache saved."""
    done = sum(one.policy is not None for one in found.outcomes)
    reused = sum(one.reused for one in found.outcomes)
    what = f"{done} of {len(found.outcomes)} trainings finished, {reused} of them found in the store"
    tables.headline(console, "sweep", what, found.folder, reused == len(found.outcomes))
    if found.ranking.settings:
        console.print(ranked_table(found.ranking))
        console.print(Text(f"  {found.ranking.verdict}", style="bold"), soft_wrap=True)
        note = "mean over seeds ± standard deviation; at start: accuracy before training; chosen, rejected: change of the log-prob in nats"
        console.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    for one in found.failed:
        line = f"  FAILED  {one.member.number}: {one.member.name}: {one.problem}"
        console.print(Text(line, style="red"), soft_wrap=True)
    if found.reference_rows:
        console.print(
            f"  The reference scored {found.reference_rows:,} completions once for all trainings: "
            f"{found.reference_rows_saved:,} forwards of completions saved.",
            soft_wrap=True,
        )
    where = f"Curves: {found.folder / 'curves.png'}; as a page: align report {shlex.quote(str(found.folder))}"
    console.print(Text(f"  {where}", style="dim"), soft_wrap=True)


def ranked_table(ranking: Ranking) -> Table:
    """Settings, best first; `best` marks a clear one, `~` those within noise of the first."""
    keys = [key for key in ranking.settings[0].values if key != SEED]
    columns = [
        column for column in COLUMNS if any(one.mean(column[0]) is not None for one in ranking.settings)
    ]
    if ranking.metric not in [name for name, _, _ in COLUMNS]:
        columns = [(ranking.metric, ranking.metric, True), *columns]
    heads = [*(short_name(key, keys) for key in keys), "seeds", *(title for _, title, _ in columns)]
    table = tables.columns("", *heads)
    table.padding = (0, 1, 0, 0)
    for setting in ranking.settings:
        values = [shown(setting.values[key]) for key in keys]
        cells = [_cell(setting, name, spread) for name, _, spread in columns]
        table.add_row(_mark(ranking, setting), *values, str(len(setting.trials)), *cells)
    return table


def _mark(ranking: Ranking, setting: Setting) -> str:
    if setting.name == ranking.best:
        return "best"
    return "~" if setting.name in ranking.close or (ranking.close and setting is ranking.settings[0]) else ""


def _cell(setting: Setting, metric: str, with_spread: bool) -> str:
    mean, spread = setting.mean(metric), setting.spread(metric)
    if mean is None:
        return ""
    return f"{mean:.3f}" + (f" ±{spread:.3f}" if with_spread and spread is not None else "")
