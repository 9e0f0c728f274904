"""What `align plan` prints: the run in numbers, where its memory goes, and the table of batches and lengths."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MIB, GIB = 1 << 20, 1 << 30
KINDS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer state"),
    ("activations", "activations"),
)
NARROW = 100


def show_plan(plan: dict[str, Any]) -> None:
    """Print a plan as tables on stdout, with a warning first where memory will not do."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = NARROW
    predicted, available = plan["predicted"], plan["available_bytes"]
    needed = {
        "predicted": predicted["total"],
        "held when measured": plan.get("measured", {}).get("held_bytes"),
    }
    over = [f"{_size(value)} {how}" for how, value in needed.items() if value and value > available]
    if available and over:
        console.print(
            Text(
                f"Out of memory is to be expected: {', '.join(over)}, {_size(available)} available. "
                f"What helps, in this order: train.gradient_checkpointing=true, a smaller compute.tokens_per_batch, "
                f"train.optimizer=adamw_8bit, adapter.name=lora.",
                style="bold red",
            )
        )
    console.print(_run(plan))
    console.print()
    console.print(_kinds(plan))
    console.print()
    if all(cell["bytes"] is None for cell in plan["table"]):
        console.print(
            f"  The model has too few positions for {plan['table'][0]['length']:,} tokens, so there is no table of batches."
        )
        return
    console.print(_cells(plan))
    console.print(
        "  Each cell: one forward and backward pass over so many pairs of that length, prompt and completion\n"
        "  together, half of it prompt, and everything that is kept with it."
        + (" ! is more than is available." if available else "")
    )


def _run(plan: dict[str, Any]) -> Table:
    table = _plain()
    predicted = plan["predicted"]
    table.add_row("steps", f"{plan['steps']:,} of {plan['batch_size']:,} examples")
    table.add_row(
        "tokens", f"{plan['tokens']:,} in all, about {plan['tokens_per_step']:,} a step, each prompt once"
    )
    table.add_row(
        "parameters", f"{predicted['num_parameters']:,}, of which {predicted['num_trained']:,} are trained"
    )
    if measured := plan.get("measured"):
        table.add_row(
            "time",
            f"{_duration(measured['run_seconds'])} without evaluation, at {measured['tokens_per_second']:,.0f} tokens/s "
            f"({measured['packs']} passes on {measured['device']})",
        )
    else:
        table.add_row("time", "not measured; add --measure")
    return table


def _kinds(plan: dict[str, Any]) -> Table:
    predicted, measured = plan["predicted"], plan.get("measured")
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("memory", style="bold")
    table.add_column("predicted", justify="right")
    if measured:
        table.add_column("measured", justify="right")
    for key, label in KINDS:
        table.add_row(label, _size(predicted[key]))
    table.add_row("all", _size(predicted["total"]), *([_known(measured["peak_bytes"])] if measured else []))
    if measured:
        table.add_row("held, with what was freed", "", _known(measured["held_bytes"]))
    table.add_row("available", _size(plan["available_bytes"]) if plan["available_bytes"] else "unknown")
    return table


def _cells(plan: dict[str, Any]) -> Table:
    lengths = sorted({cell["length"] for cell in plan["table"] if cell["bytes"] is not None})
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("pairs", style="bold", justify="right")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for batch in sorted({cell["batch"] for cell in plan["table"]}):
        cells = [
            cell["bytes"] for cell in plan["table"] if cell["batch"] == batch and cell["length"] in lengths
        ]
        table.add_row(str(batch), *(_cell(value, plan["available_bytes"]) for value in cells))
    return table


def _cell(value: int, available: int) -> Text:
    too_much = bool(available) and value > available
    return Text(f"{_size(value)}{' !' if too_much else ''}", style="red" if too_much else "")


def _known(value: int | None) -> str:
    return "unknown" if value is None else _size(value)


def _size(value: int) -> str:
    if value < GIB / 10:
        return f"{value / MIB:,.1f} MiB"
    return f"{value / GIB:,.2f} GiB" if value < 100 * GIB else f"{value / GIB:,.0f} GiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {left:02} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _plain() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    return table
