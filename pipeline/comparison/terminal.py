"""A comparison on a terminal: a column for each model, the baseline first."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pipeline import tables
from pipeline.comparison.figures import Lines, notes, text_lines, win_lines
from stages.compare.comparison import Comparison


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print the figures, and why one is missing."""
    baseline, models = comparison.baseline, comparison.models
    judges = sorted({model.against.judge for model in models if model.against})
    by = f", judged by {', '.join(judges)}" if judges else ", not judged: name a judge to see who wins"
    console.print(Text.assemble(("compare", "bold"), f"  with {baseline.name} as the baseline{by}"))
    table = tables.columns("", f"{baseline.name} (baseline)", *(model.name for model in models))
    wins = [win_lines(model.against) if model.against else {} for model in models]
    texts = [text_lines(one.texts) for one in (baseline, *models)]
    for columns in ([{}, *wins], texts):
        for label in _labels(columns):
            table.add_row(label, *(lines.get(label, "") for lines in columns))
    console.print(table)
    for model in models:
        for note in notes(model.against) if model.against else ():
            console.print(Text(f"  {model.name}: {note}", style="yellow"), soft_wrap=True)


def _labels(columns: Sequence[Lines]) -> list[str]:
    """The labels of all columns, in the order of the fullest one."""
    fullest = max(columns, key=len)
    return list(dict.fromkeys([*fullest, *(label for lines in columns for label in lines)]))
