"""`align train`: trains the policy."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, Intent, StageResult, found_or_made

if TYPE_CHECKING:
    from pipeline.inputs import Inputs

SHOWN_METRICS = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("logps/chosen", "chosen log-prob"),
    ("logps/rejected", "rejected log-prob"),
    ("logratios/chosen", "chosen log-ratio"),
    ("logratios/rejected", "rejected log-ratio"),
)
SHOWN_CHARTS = ("accuracy", "margin")
SHOWN_OF_EVAL_SETS = SHOWN_METRICS[:3]


@dataclass(frozen=True)
class Trained(StageResult):
    """The policy artifact, and the address that it was uploaded to."""

    uploaded: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**super().as_json(), **({"uploaded": self.uploaded} if self.uploaded else {})}

    def show(self, console: Console) -> None:
        """Print steps, and the held-out metrics before and after training."""
        counts = self.artifact.counts
        what = f"{counts['steps']:,} steps on {counts['examples']:,} examples"
        tables.headline(console, "train", what, self.artifact.path, self.reused)
        for warning in counts.get("warnings", []):
            console.print(Text(f"  Warning: {warning}.", style="yellow"), soft_wrap=True)
        if not counts["final"]:
            console.print(
                "  No evaluation: there are no held-out examples. Raise prepare.heldout_fraction to hold some out."
            )
            return
        console.print(_metrics(counts["step0"], counts["final"]))
        if counts["skipped_steps"]:
            console.print(
                f"  {counts['skipped_steps']:,} steps were skipped because their loss or gradient was not finite."
            )
        if "best" in counts:
            best = counts["best"]
            console.print(f"  best {best['metric']}: {best['value']:.4g} at step {best['step']:,}")
        if self.uploaded:
            console.print(Text(f"  uploaded to {self.uploaded}"), soft_wrap=True)
        if console.is_terminal:
            _show_curves(console, self.artifact.path)


def _show_curves(console: Console, policy: Path) -> None:
    from pipeline.report.terminal import show_curves
    from stages.curves.charts import CHARTS
    from stages.curves.draw import DrawnRun
    from stages.train.monitoring.metrics_log import METRICS, read_metrics

    shown = [chart for chart in CHARTS if chart.name in SHOWN_CHARTS]
    show_curves(console, shown, [DrawnRun("", read_metrics(policy / METRICS))])


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    table = tables.columns("held-out metric", "before", "after")
    sets = [key.removesuffix("/loss") for key in before if key.endswith("/loss")]
    shown = list(SHOWN_METRICS)
    shown += [(f"{name}/{key}", f"{name}: {label}") for name in sets for key, label in SHOWN_OF_EVAL_SETS]
    for key, label in shown:
        if key in after:
            table.add_row(label, tables.signed(before.get(key)), tables.signed(after[key]))
    return table


def train(
    inputs: "Inputs",
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="OWNER/NAME",
            help="Upload the policy to this repository of the Hugging Face hub, which is made private if it is new.",
        ),
    ] = None,
) -> Trained:
    """Stage 3: train the policy with any loss, on cached reference log-probs.

    The reference model itself is not loaded.
    """
    from pipeline.hub import check_repository, push
    from stages.train.job import find_policy
    from stages.train.publish import remove_leftovers
    from stages.train.stage import train as make_policy

    if push_to_hub is not None:
        check_repository(push_to_hub)
    job, context = inputs.job, inputs.context
    found = find_policy(job, context)
    if found:
        remove_leftovers(found)
        known, wanted = found.manifest["provenance"].get("name"), job.settings.name
        if wanted not in (None, known):
            context.log(
                f"train: these settings were trained before as {known or found.path.name}; that name stays"
            )
    make = partial(make_policy, job, inputs.config.track, context)
    artifact, reused = found_or_made("train", found, make, context.log)
    if push_to_hub is None or os.environ.get("RANK", "0") != "0":
        return Trained(artifact, reused)
    return Trained(artifact, reused, push(artifact.path, push_to_hub))


def would_train(inputs: "Inputs", push_to_hub: str | None = None) -> Intent:
    """Steps and rates of the run, and whether its policy is there."""
    from stages.train.job import find_policy
    from stages.train.preflight import check_data

    job = inputs.job
    check_data(job.loss, job.rows, job.settings.pairs, inputs.context)
    return Intent(
        "reuse" if find_policy(job, inputs.context) else "train",
        {
            "loss": inputs.loss_name,
            "examples": job.rows.counts["examples"]["train"],
            "steps": job.resolved.steps,
            "batch_size": job.resolved.batch_size,
            "learning_rate": job.resolved.learning_rate,
            **({"upload_to": push_to_hub} if push_to_hub else {}),
        },
    )


TRAIN = Command(
    "train",
    train,
    examples=("align train --loss kto", "align train -c configs/simpo.yaml --set train.learning_rate=1e-6"),
    intent=would_train,
    takes_assignments=True,
)
