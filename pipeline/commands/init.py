"""`align init`: writes a first configuration."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache.errors import UsageError
from pipeline.commands.command import Command, Given, flag

if TYPE_CHECKING:
    from pipeline.first_config import Guess


@dataclass(frozen=True)
class Written:
    """The file, what was guessed, and the first rows as a table."""

    path: Path
    guess: "Guess"
    rows: Table

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        guess = self.guess
        return {
            "config": str(self.path),
            "columns": dict(guess.columns),
            "format": guess.format,
            "template": guess.template,
            "loss": guess.loss,
            "rows_read": guess.rows_read,
            "longest": guess.longest,
        }

    def show(self, console: Console) -> None:
        """Print what was guessed, three examples, and the next command."""
        from pipeline import tables
        from pipeline.inspect.terminal import show_legend
        from stages.formats.guessed_columns import as_yaml

        guess, table = self.guess, tables.labelled()
        if guess.columns:
            table.add_row("columns", as_yaml(guess.columns))
        table.add_row("format", guess.format)
        table.add_row("template", guess.template)
        table.add_row("loss", f"{guess.loss}, for {guess.why}")
        table.add_row("longest", f"{guess.longest:,} tokens, of {guess.rows_read:,} rows read")
        console.print(table)
        console.print()
        show_legend(console)
        console.print("  ◀ end: where what is trained ends")
        console.print(self.rows)
        console.print()
        console.print(
            Text(f"wrote {self.path}  → align run -c {shlex.quote(str(self.path))}", "bold"), soft_wrap=True
        )


def init(
    given: Given,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Folder or hub name of the model to train.")
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="PATH", help="File, folder or hub dataset with preferences."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The configuration to write.")
    ] = Path("run.yaml"),
    force: Annotated[bool, flag("--force", "Replace the file if it exists.")] = False,
) -> Written:
    """Write a commented configuration for a model and preference data, and show three rows as they are trained.

    Format, template and loss are guessed from the first rows with the code of `align prepare`.
    """
    if output.exists() and not force:
        raise UsageError(f"{output} exists. Name another file with -o FILE, or replace it with --force.")

    _look_for(data)

    from cache.files import disk_errors_named
    from pipeline.first_config import guessed
    from pipeline.inspect.first_rows import first_rows

    with guessed(model, data) as (guess, rows, tokenizer):
        shown = first_rows(rows, tokenizer)
        with disk_errors_named(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(guess.yaml(), encoding="utf-8")
    return Written(output, guess, shown)


def _look_for(data: str) -> None:
    """Raise `DataError` for a file that is missing, before torch is imported."""
    from pipeline.config_sources import EMBEDDED
    from stages.data.readers import local_files
    from stages.settings.data import DataSettings

    if data != EMBEDDED:
        local_files(DataSettings(path=data))


INIT = Command(
    "init",
    init,
    examples=(
        "align init --model allenai/OLMo-2-0425-1B-SFT --data pairs.jsonl",
        "align init --model ./my-model --data thumbs.csv -o thumbs.yaml",
    ),
    takes_loss=False,
    without_config=("offline", "json_", "quiet", "debug"),
)
