"""`align inspect`: prepared rows in numbers, and single examples token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cache.errors import UsageError
from pipeline.commands.command import Command

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from pipeline.inspect.overview import Overview
    from pipeline.inspect.prepared_rows import ShownExample


@dataclass(frozen=True)
class Inspected:
    """A rows artifact in numbers, and the examples that were chosen."""

    overview: "Overview"
    examples: "Sequence[ShownExample]"
    with_ids: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, without the examples."""
        return self.overview.as_json()

    def show(self, console: Console) -> None:
        """The numbers, then the examples coloured by part."""
        from pipeline.inspect.terminal import show_example, show_legend, show_overview

        show_overview(console, self.overview)
        console.print()
        show_legend(console)
        for example in self.examples:
            show_example(console, example, self.with_ids)


def inspect(
    inputs: "Inputs",
    artifact: Annotated[
        Path | None,
        typer.Argument(help="A folder that `align prepare` wrote; none means that of the configuration."),
    ] = None,
    row: Annotated[int | None, typer.Option("--row", metavar="N", help="Show this row, from 1.")] = None,
    random: Annotated[
        int | None, typer.Option("--random", metavar="COUNT", min=1, help="Show so many rows at random.")
    ] = None,
    longest: Annotated[bool, typer.Option("--longest", help="Show the longest row.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id of every token.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page, too.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="DIR", help="Where the tokenizer is, if it has been moved."),
    ] = None,
) -> Inspected:
    """Look at prepared rows: lengths, cuts, and single examples, token by token and coloured by part."""
    from pipeline.inspect.page import write_page
    from pipeline.inspect.prepared_rows import open_rows

    if sum((row is not None, random is not None, longest)) > 1:
        raise UsageError("--row, --random and --longest are three choices. Give one of them.")
    rows = open_rows(artifact or inputs.rows.path, tokenizer)
    overview, examples = rows.overview(), rows.chosen(row, random, longest)
    if html is not None:
        write_page(html, overview, examples, ids)
        inputs.context.say(f"inspect: wrote {html}")
    return Inspected(overview, examples, ids)


INSPECT = Command(
    "inspect",
    inspect,
    examples=("align inspect --random 3", "align inspect -c configs/dpo.yaml --longest --html rows.html"),
    takes_loss=False,
)
