"""Tables and numbers as every command prints them on a terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Of a terminal that does not say its width: a file or a pipe.
WIDTH = 100
MIB, GIB = 1 << 20, 1 << 30


def console() -> Console:
    """stdout, as wide as the terminal."""
    shown = Console(highlight=False, soft_wrap=False)
    if not shown.is_terminal:
        shown.width = WIDTH
    return shown


def headline(console: Console, name: str, what: str, folder: Path, reused: bool) -> None:
    """What a stage did, in one line, and the folder of its artifact."""
    state = "already done" if reused else "done"
    console.print(Text.assemble((name, "bold"), f"  {what}  ({state})"))
    console.print(Text(f"  {folder}", style="dim"), soft_wrap=True)


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
        table.add_column(name, justify="right")
    return table


def plain(value: Any) -> str:
    """A value of a dry run in words."""
    if isinstance(value, list):
        return " and ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def counted(counts: dict[str, int]) -> str:
    """Counts by name, such as `3 bad row, 1 duplicate`; empty where there are none."""
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


def signed(value: float | None) -> str:
    """A number whose sign takes no room from its digits; empty for None."""
    return "" if value is None else f"{value:+.4f}".replace("+", " ")
