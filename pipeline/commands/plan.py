"""`align plan`: predicts steps, tokens, memory and time of a training run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, flag

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
    """The prediction, and how it is printed."""

    plan: "TrainingPlan"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return self.plan.as_json()

    def show(self, console: Console) -> None:
        """Print tables, after a warning where the run needs more memory than is available."""
        plan = self.plan
        over = _over_available(plan)
        if over:
            console.print(
                Text(
                    f"The run will probably run out of memory: {', '.join(over)}, {tables.size(plan.available_bytes)} available. "
                    f"To save memory, try in this order: train.gradient_checkpointing=true, a smaller compute.tokens_per_batch, "
                    f"train.optimizer=adamw_8bit, adapter.name=lora.",
                    style="bold red",
                )
            )
        console.print(_run(plan))
        console.print()
        console.print(_memory(plan))
        console.print()
        console.print(_budgets(plan))
        console.print()
        if all(cell.bytes is None for cell in plan.table):
            shortest = min(cell.length for cell in plan.table)
            console.print(f"  No table of batch sizes: the model has fewer than {shortest:,} positions.")
            return
        console.print(_cells(plan))
        console.print(
            "  Memory of a step with one forward and backward pass over this many pairs; the length is that of\n"
            "  prompt and completion together, half of it prompt."
            + (" ! marks more than is available." if plan.available_bytes else "")
        )


def _over_available(plan: "TrainingPlan") -> list[str]:
    """The figures that exceed the available memory; none if that is unknown (0)."""
    needed = {"predicted": plan.predicted.total}
    if plan.measured and plan.measured.held_bytes:
        needed["reserved when measured"] = plan.measured.held_bytes
    if not plan.available_bytes:
        return []
    return [f"{tables.size(value)} {how}" for how, value in needed.items() if value > plan.available_bytes]


def _run(plan: "TrainingPlan") -> Table:
    table = tables.labelled()
    predicted, measured = plan.predicted, plan.measured
    table.add_row("steps", f"{plan.steps:,} of {plan.batch_size:,} examples")
    table.add_row(
        "tokens",
        f"{plan.tokens:,} in total, about {plan.tokens_per_step:,} per step, what a pack shares once",
    )
    table.add_row("tokens of a step", str(plan.shared))
    table.add_row("parameters", f"{predicted.num_parameters:,}, {predicted.num_trained:,} of them trained")
    if measured:
        table.add_row(
            "time",
            f"{tables.duration(measured.run_seconds)} without evaluations, at {measured.tokens_per_second:,.0f} tokens/s "
            f"({measured.packs} passes measured on {measured.device})",
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
        "total", tables.size(plan.predicted.total), *([_known(measured.peak_bytes)] if measured else [])
    )
    if measured:
        table.add_row("reserved, with freed memory", "", _known(measured.held_bytes))
    table.add_row("available", _known(plan.available_bytes or None))
    return table


def _budgets(plan: "TrainingPlan") -> Table:
    table = tables.columns("compute.tokens_per_batch", "tokens per step", "memory")
    for budget in plan.budgets:
        own = " (now)" if budget.tokens_per_batch == plan.tokens_per_batch else ""
        table.add_row(
            f"{budget.tokens_per_batch:,}{own}",
            f"{budget.tokens_per_step:,}",
            _cell(budget.bytes, plan.available_bytes),
        )
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
        bool, flag("--measure", "Also load the model and measure a few forward and backward passes.")
    ] = False,
) -> Planned:
    """Predict steps, tokens, memory and time of a training run.

    Only `--measure` loads the weights, and only then is time predicted.
    """
    from stages.plan.stage import plan_training

    return Planned(plan_training(inputs.job_without_reference, measure, inputs.context.log))


PLAN = Command("plan", plan, examples=("align plan", "align plan -c configs/dpo.yaml --measure"))
