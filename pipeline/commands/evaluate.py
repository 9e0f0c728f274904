"""`align eval`: held-out metrics of any policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, Intent

if TYPE_CHECKING:
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Evaluated:
    """Metrics by evaluation set; `loss_state` is None for a loss that keeps none."""

    model: str
    loss: str
    loss_state: Mapping[str, float] | None
    sets: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        state = {} if self.loss_state is None else {"loss_state": self.loss_state or None}
        return {"model": self.model, "loss": self.loss, **state, "sets": self.sets}

    def show(self, console: Console) -> None:
        """One column for each evaluation set, one row for each metric."""
        console.print(Text.assemble(("eval", "bold"), f"  {self.model} with {self.loss}"))
        sets = self.sets.values()
        titles = [f"{name} ({metrics['examples']:,})" for name, metrics in self.sets.items()]
        table = tables.columns("held out", *titles)
        for name in dict.fromkeys(name for metrics in sets for name in metrics if name != "examples"):
            table.add_row(name, *(tables.signed(metrics.get(name)) for metrics in sets))
        console.print(table)


def evaluate(inputs: "Inputs") -> Evaluated:
    """Held-out metrics of any policy: the one trained, or eval.model, with the reference's cached log-probs."""
    from stages.evaluate import evaluate_model, saved_state

    job, model, context = inputs.job, inputs.evaluated, inputs.context
    state = saved_state(model.folder, job.loss)
    if job.loss.keeps_state:
        begin = f"goes on from that of {model.name}" if state else "begins at 0, as before the first step"
        context.say(f"The running mean of {inputs.loss_name} {begin}: {model.folder}")
    sets = evaluate_model(job, model, state, context)
    return Evaluated(model.name, inputs.loss_name, state if job.loss.keeps_state else None, sets)


def would_evaluate(inputs: "Inputs") -> Intent:
    """Which model, with which loss."""
    return Intent("evaluate", {"model": inputs.evaluated.name, "loss": inputs.loss_name})


EVALUATE = Command(
    "eval",
    evaluate,
    examples=(
        "align eval",
        "align eval --set eval.model=artifacts/policy/NAME --set eval.sets.mine=pairs.jsonl",
    ),
    intent=would_evaluate,
)
