"""`align plan`: the run in numbers, where its memory goes, and a table of batches and lengths."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from stages.plan.stage import TrainingPlan

KINDS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer state"),
    ("activations", "activations"),
)


@dataclass(frozen=True)
class Planned:
    """The plan of a training run."""

    plan: "TrainingPlan"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return self.plan.as_json()

    def show(self, console: Console) -> None:
        """Tables, with a warning first where the run needs more memory than is available."""
        plan = self.plan
        over = _over_available(plan)
        if over:
            console.print(
                Text(
                    f"Out of memory is to be expected: {', '.join(over)}, {tables.size(plan.available_bytes)} available. "
                    f"What helps, in this order: train.gradient_checkpointing=true, a smaller compute.tokens_per_batch, "
                    f"train.optimizer=adamw_8bit, adapter.name=lora.",
                    style="bold red",
                )
            )
        console.print(_run(plan))
        console.print()
        console.print(_memory(plan))
        console.print()
        if all(cell.bytes is None for cell in plan.table):
            shortest = min(cell.length for cell in plan.table)
            console.print(
                f"  The model has too few positions for {shortest:,} tokens, so there is no table of batches."
            )
            return
        console.print(_cells(plan))
        console.print(
            "  Each cell: one forward and backward pass over so many pairs of that length, prompt and completion\n"
            "  together, half of it prompt, and everything that is kept with it."
            + (" ! is more than is available." if plan.available_bytes else "")
        )


def _over_available(plan: "TrainingPlan") -> list[str]:
    """The figures that exceed the available memory; none where that is unknown (0)."""
    needed = {"predicted": plan.predicted.total}
    if plan.measured and plan.measured.held_bytes:
        needed["held when measured"] = plan.measured.held_bytes
    if not plan.available_bytes:
        return []
    return [f"{tables.size(value)} {how}" for how, value in needed.items() if value > plan.available_bytes]


def _run(plan: "TrainingPlan") -> Table:
    table = tables.labelled()
    predicted, measured = plan.predicted, plan.measured
    table.add_row("steps", f"{plan.steps:,} of {plan.batch_size:,} examples")
    table.add_row(
        "tokens", f"{plan.tokens:,} in all, about {plan.tokens_per_step:,} a step, each prompt once"
    )
    table.add_row(
        "parameters", f"{predicted.num_parameters:,}, of which {predicted.num_trained:,} are trained"
    )
    if measured:
        table.add_row(
            "time",
            f"{tables.duration(measured.run_seconds)} without evaluation, at {measured.tokens_per_second:,.0f} tokens/s "
            f"({measured.packs} passes on {measured.device})",
        )
    else:
        table.add_row("time", "not measured; add --measure")
    return table


def _memory(plan: "TrainingPlan") -> Table:
    measured = plan.measured
    table = tables.columns("memory", "predicted", *(["measured"] if measured else []))
    for key, label in KINDS:
        table.add_row(label, tables.size(getattr(plan.predicted, key)))
    table.add_row(
        "all", tables.size(plan.predicted.total), *([_known(measured.peak_bytes)] if measured else [])
    )
    if measured:
        table.add_row("held, with what was freed", "", _known(measured.held_bytes))
    table.add_row("available", _known(plan.available_bytes or None))
    return table


def _cells(plan: "TrainingPlan") -> Table:
    possible = [cell for cell in plan.table if cell.bytes is not None]
    lengths = sorted({cell.length for cell in possible})
    table = tables.columns("pairs", *(f"{length:,} tokens" for length in lengths))
    table.columns[0].justify = "right"
    for batch in sorted({cell.batch for cell in possible}):
        row = [cell.bytes for cell in possible if cell.batch == batch]
        table.add_row(str(batch), *(_cell(value, plan.available_bytes) for value in row if value is not None))
    return table


def _cell(value: int, available: int) -> Text:
    too_much = bool(available) and value > available
    return Text(f"{tables.size(value)}{' !' if too_much else ''}", style="red" if too_much else "")


def _known(value: int | None) -> str:
    return "unknown" if value is None else tables.size(value)


def plan(
    inputs: "Inputs",
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time a few forward and backward passes.")
    ] = False,
) -> Planned:
    """Steps, tokens, memory and time of a training run, before it is started; refuses nothing."""
    from stages.plan.stage import plan_training

    return Planned(plan_training(inputs.job_without_reference, measure, inputs.context.say))


PLAN = Command("plan", plan, examples=("align plan", "align plan -c configs/dpo.yaml --measure"))
