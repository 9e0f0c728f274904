"""The end of a training run: the policy as a Hugging Face folder, published as an artifact."""

import shutil
from pathlib import Path

from stages.context import Context
from stages.loop import METRICS, Run
from stages.models import ModelSource
from stages.tracking import read_metrics


def publish_policy(run: Run, source: ModelSource, context: Context) -> None:
    """Save the policy as a Hugging Face folder, or an adapter as peft's, and publish the artifact; all ranks call."""
    folder: Path = run.draft.path
    run.policy.save(folder)
    if not run.world.is_main:
        return
    lines = read_metrics(folder / METRICS)
    evaluations = [
        {name: value for name, value in line.items() if name.startswith("eval/")} for line in lines
    ]
    evaluations = [values for values in evaluations if values]
    for leftover in [*folder.glob("checkpoint-*"), *folder.glob(".tmp-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    counts = {
        "steps": run.plan.steps,
        "examples": run.rows.num_examples,
        "step0": _plain(evaluations[0]) if evaluations else {},
        "final": _plain(evaluations[-1]) if evaluations else {},
        "audit_max_abs_diff": run.audit_difference,
    }
    context.store.publish(run.draft, counts, {}, context.config_text, policy=source.name)


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}
