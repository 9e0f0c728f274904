"""`align eval`: computes the held-out metrics of any policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.text import Text

from cache.errors import UsageError
from pipeline import tables
from pipeline.commands.command import Command, Intent, flag

if TYPE_CHECKING:
    from pipeline.commands.judge import JudgedRun
    from pipeline.inputs import Inputs


@dataclass(frozen=True)
class Evaluated:
    """Metrics by evaluation set, and with `--judge` the verdicts on completions.

    `loss_state` holds the running means that a loss such as bco keeps, else None.
    """

    model: str
    loss: str
    loss_state: Mapping[str, float] | None
    sets: Mapping[str, Mapping[str, float]]
    judged: "JudgedRun | None" = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        state = {} if self.loss_state is None else {"loss_state": self.loss_state or None}
        judged = {"judge": self.judged.as_json()} if self.judged else {}
        return {"model": self.model, "loss": self.loss, **state, "sets": self.sets, **judged}

    def show(self, console: Console) -> None:
        """Print one column for each evaluation set."""
        console.print(Text.assemble(("eval", "bold"), f"  {self.model}, loss {self.loss}"))
        sets = self.sets.values()
        titles = [f"{name} ({metrics['examples']:,} examples)" for name, metrics in self.sets.items()]
        table = tables.columns("metric", *titles)
        for name in dict.fromkeys(name for metrics in sets for name in metrics if name != "examples"):
            table.add_row(name, *(tables.signed(metrics.get(name)) for metrics in sets))
        console.print(table)
        if self.judged:
            self.judged.show(console)


def evaluate(
    inputs: "Inputs",
    judge: Annotated[
        bool, flag("--judge", "Also judge the completions that `align sample` made: the win-rate.")
    ] = False,
) -> Evaluated:
    """Compute held-out metrics of the trained policy, or of `eval.model`.

    Reference log-probs come from the cache. With `--judge` the win-rate also goes to the dashboards of the run.
    """
    from pipeline.commands.judge import judge as judge_run
    from stages.evaluate import evaluate_model, saved_state

    if judge:
        _check_one_model(inputs)
    job, model, context = inputs.job, inputs.evaluated, inputs.context
    state = saved_state(model.folder, job.loss)
    if job.loss.keeps_state:
        start = f"continues from {model.name}" if state else "starts at 0, as before the first step"
        context.log(f"The running mean of {inputs.loss_name} {start}: {model.folder}")
    sets = evaluate_model(job, model, state, context)
    judged = judge_run(inputs) if judge else None
    if judged:
        _log_win_rate(inputs, model.folder, judged)
    return Evaluated(model.name, inputs.loss_name, state if job.loss.keeps_state else None, sets, judged)


def _log_win_rate(inputs: "Inputs", model: Path, judged: "JudgedRun") -> None:
    """Add the win-rate to the run that trained `model`, on the dashboards of the block `track`."""
    from cache.artifacts import is_artifact, open_artifact
    from stages.train.monitoring.dashboards import log_to_finished_run

    track, rate = inputs.config.track, judged.against.rate
    if rate is None or not (track.wandb != "disabled" or track.tensorboard or track.trackio):
        return
    if not is_artifact(model):
        inputs.context.log(f"eval: {model} is no run of align, so its win-rate is on no dashboard")
        return
    metrics = {"win_rate": rate.rate, "win_rate_low": rate.low, "win_rate_high": rate.high}
    log_to_finished_run(
        track, open_artifact(model), {f"eval/{name}": value for name, value in metrics.items()}
    )


def _check_one_model(inputs: "Inputs") -> None:
    """Raise `UsageError` if the completions that would be judged are those of another model."""
    evaluated, sampled = inputs.config.eval.model, inputs.config.sample.model
    if evaluated != sampled:
        raise UsageError(
            f"--judge judges the completions of sample.model, {sampled or 'the policy'}, and eval.model is {evaluated or 'the policy'}. Name one model under both keys."
        )


def would_evaluate(inputs: "Inputs", judge: bool = False) -> Intent:
    """Name the model and the loss."""
    if judge:
        _check_one_model(inputs)
    return Intent("evaluate", {"model": inputs.evaluated.name, "loss": inputs.loss_name})


EVALUATE = Command(
    "eval",
    evaluate,
    examples=(
        "align eval",
        "align eval --judge --set judge.function=rules:politeness",
        "align eval --set eval.model=artifacts/policy/NAME --set eval.sets.mine=pairs.jsonl",
    ),
    intent=would_evaluate,
)
