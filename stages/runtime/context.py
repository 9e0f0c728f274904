"""What every stage is given besides its configuration: the store, a log for people, progress."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cache.artifacts import Store

PLAIN_LINE_SECONDS = 10.0


def log_to_stderr(line: str) -> None:
    """Print one line for people; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Context:
    """The environment of a stage run.

    `config_text` is the resolved configuration, saved with the artifact. `arguments` are the command-line arguments of
    this configuration, repeated in the commands that errors suggest; `loss` is the value of `--loss`, and `takes_loss`
    names the commands that have this option.
    """

    store: Store
    config_text: str = ""
    arguments: str = ""
    loss: str | None = None
    takes_loss: frozenset[str] = frozenset()
    log: Callable[[str], None] = field(default=log_to_stderr)

    def command(self, stage: str, extra: str = "") -> str:
        """The command line that runs `stage` with this configuration."""
        loss = f"--loss {self.loss}" if self.loss and stage in self.takes_loss else ""
        return " ".join(part for part in ("align", stage, loss, self.arguments, extra) if part)


@contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show progress on stderr: a bar on a terminal, otherwise a line every `PLAIN_LINE_SECONDS`.

    `done` of the `total` were done by an earlier process: they count, and the time left is that of the rest at the rate of this
    process. Yields a function `advance(amount, note)`.
    """
    if sys.stderr.isatty():
        with _bar(description, total, unit, done) as advance:
            yield advance
    else:
        yield _lines(description, total, unit, done)


@contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)
    columns = (
        TextColumn(description),
        BarColumn(bar_width=40 if console.width >= 120 else 10),
        MofNCompleteColumn(),
        TextColumn(unit),
        # On a narrow terminal the note is cut, and not the time left.
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda amount, note: bar.update(task, advance=amount, note=note)


def _lines(description: str, total: int, unit: str, before: int) -> Callable[[int, str], None]:
    done, started = before, time.monotonic()
    last = started

    def advance(amount: int, note: str) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            left = (now - started) / max(done - before, 1) * (total - done)
            print(
                f"{description}: {done:,} of {total:,} {unit}, {note}, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return advance
