"""`align compare`: shows how completions differ, and who wins by a judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.commands.command import Command, Intent

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from stages.compare.comparison import Comparison


COMPARED = ("completions", "verdicts")


@dataclass(frozen=True)
class ComparedModels:
    """The figures of a baseline and of the models that are compared with it."""

    comparison: "Comparison"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, without the texts."""
        return self.comparison.as_json()

    def show(self, console: Console) -> None:
        """Print a column for each model, the baseline first."""
        from pipeline.comparison.terminal import show_comparison

        show_comparison(console, self.comparison)


def compare(
    inputs: "Inputs",
    completions: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders or files of completions, or folders of verdicts. Each is compared with the first, the baseline. Default: policy and reference of the configuration."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page.")
    ] = None,
) -> ComparedModels:
    """Compare completions of several models: win-rates by the configuration's judge, lengths, diversity, refusals.

    Without a judge, the figures of the texts alone.
    """
    from pipeline.catalogue.names import folder_or_path
    from pipeline.comparison.page import write_page
    from pipeline.comparison.sources import compare_paths

    root = inputs.context.store.root
    found = compare_paths(inputs, [folder_or_path(root, path, COMPARED) for path in completions or []])
    if html is not None:
        write_page(html, found)
        inputs.context.log(f"compare: wrote {html}")
    return ComparedModels(found)


def would_compare(
    inputs: "Inputs", completions: Sequence[Path] | None = None, html: Path | None = None
) -> Intent:
    """Name the judge and what is compared."""
    from pipeline.judges import judge_kind

    names = [str(path) for path in completions or []] or ["reference", "policy"]
    return Intent("compare", {"judge": judge_kind(inputs) or "none", "completions": names})


COMPARE = Command(
    "compare",
    compare,
    examples=(
        "align compare --set judge.function=rules:politeness",
        "align compare baseline.jsonl artifacts/completions/NAME --html comparison.html",
    ),
    intent=would_compare,
)
