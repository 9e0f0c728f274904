"""Tables and numbers as commands print them on a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cache.artifacts import Artifact


# Where stdout is a file or a pipe, which has no width.
WIDTH = 100
LIMITS = ("max_length", "max_prompt_length", "max_completion_length")
MIB, GIB = 1 << 20, 1 << 30


def console() -> Console:
    """stdout, as wide as the terminal."""
    shown = Console(highlight=False, soft_wrap=False)
    if not shown.is_terminal:
        shown.width = WIDTH
    return shown


def headline(console: Console, name: str, what: str, folder: Path, reused: bool) -> None:
    """Print what a stage did and the folder of its artifact."""
    state = "reused" if reused else "done"
    console.print(Text.assemble((name, "bold"), f"  {what}  ({state})"))
    console.print(Text(f"  {folder}", style="dim"), soft_wrap=True)


def print_cuts(console: Console, row_sets: "Mapping[str, Artifact]") -> None:
    """Print one line for each set of rows, by name, of which the length limits cut something off."""
    for name, rows in row_sets.items():
        settings = rows.manifest["identity"]["prepare"]
        lost = [
            f"{cut['cut']:,} {kind} lost {cut['tokens']:,} tokens (median {cut['median']:,}, at most {cut['max']:,})"
            for kind, cut in rows.counts["cuts"].items()
            if cut["cut"]
        ]
        if lost:
            limits = [f"prepare.{key}={settings[key]}" for key in LIMITS if settings[key] is not None]
            line = f"CUT: in {name}, {' and '.join(lost)}, by {', '.join(limits)}"
            console.print(Text(line, style="bold red"), soft_wrap=True)


def labelled() -> Table:
    """An empty table of labels and values, without a header."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    return table


def columns(first: str, *others: str) -> Table:
    """An empty table with a header: names on the left, then columns of numbers."""
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column(first, style="bold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def counted(counts: dict[str, int]) -> str:
    """Counts by name, such as `3 bad row, 1 duplicate`; empty for none."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def size(number: int) -> str:
    """Bytes in MiB or GiB."""
    if number < GIB / 10:
        return f"{number / MIB:,.1f} MiB"
    return f"{number / GIB:,.2f} GiB" if number < 100 * GIB else f"{number / GIB:,.0f} GiB"


def duration(seconds: float) -> str:
    """Seconds in hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {left:02} s" if minutes else f"{seconds:.1f} s"


def percent(share: float) -> str:
    """A share from 0 to 1 in percent."""
    return f"{100 * share:.1f} %"


def signed(value: float | None) -> str:
    """A number with four decimals, a blank in place of a plus; empty for None."""
    return "" if value is None else f"{value:+.4f}".replace("+", " ")


def shared_tokens(counts: Mapping[str, Any]) -> list[str]:
    """What rows of an artifact share, by the counts of its manifest; nothing for one of an earlier version."""
    if "tokens_of_tree" not in counts:
        return []
    from stages.engine.shared_tokens import SharedTokens

    return [str(SharedTokens(counts["tokens_without_sharing"], counts["tokens"], counts["tokens_of_tree"]))]
