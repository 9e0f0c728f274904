"""`align inspect`: shows prepared rows, as statistics and as examples token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cache.errors import UsageError
from pipeline.commands.command import Command, flag

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from pipeline.inspect.overview import Overview
    from pipeline.inspect.prepared_rows import ShownExample


@dataclass(frozen=True)
class Inspected:
    """Statistics of a rows artifact, and the selected examples."""

    overview: "Overview"
    examples: "Sequence[ShownExample]"
    with_ids: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, without the examples."""
        return self.overview.as_json()

    def show(self, console: Console) -> None:
        """Print the statistics, then the examples."""
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
        typer.Argument(help="A folder that `align prepare` wrote. Default: the rows of the configuration."),
    ] = None,
    row: Annotated[
        int | None, typer.Option("--row", metavar="N", help="Show example N; the first is 1.")
    ] = None,
    random: Annotated[
        int | None, typer.Option("--random", metavar="COUNT", min=1, help="Show this many random examples.")
    ] = None,
    longest: Annotated[bool, flag("--longest", "Show the longest example.")] = False,
    ids: Annotated[bool, flag("--ids", "Show the id of each token.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="DIR",
            help="Folder of the tokenizer, if it was moved after `align prepare`.",
        ),
    ] = None,
) -> Inspected:
    """Show statistics of prepared rows, and examples token by token.

    Colours tell prompt, trained, masked and special tokens apart.
    """
    from pipeline.catalogue.names import folder_or_path
    from pipeline.inspect.page import write_page
    from pipeline.inspect.prepared_rows import open_rows

    if sum((row is not None, random is not None, longest)) > 1:
        raise UsageError("--row, --random and --longest exclude each other. Give one of them.")
    folder = (
        inputs.rows.path
        if artifact is None
        else folder_or_path(inputs.context.store.root, artifact, ("rows",))
    )
    rows = open_rows(folder, tokenizer)
    overview, examples = rows.overview(), rows.chosen(row, random, longest)
    if html is not None:
        write_page(html, overview, examples, ids)
        inputs.context.log(f"inspect: wrote {html}")
    return Inspected(overview, examples, ids)


INSPECT = Command(
    "inspect",
    inspect,
    examples=("align inspect --random 3", "align inspect -c configs/dpo.yaml --longest --html rows.html"),
    takes_loss=False,
)
