"""The end of a training run: the policy as a Hugging Face folder, published as an artifact.

The policy is written into a folder of its own, which is renamed into place; only then the working folder of the run is
removed with its checkpoints. If the process is killed in between, the run continues from its last checkpoint.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, Draft
from cache.errors import CorruptError
from cache.files import TEMPORARY_PREFIX
from stages.runtime.context import Context
from stages.runtime.limits import writing
from stages.train.checkpoints import (
    PREFIX,
    Checkpoint,
    checkpoint_problem,
    checkpoint_steps,
    removed_on_failure,
)
from stages.train.loop import Run
from stages.train.model_card import write_card
from stages.train.monitoring.best_evaluation import Best
from stages.train.monitoring.dashboards import RUN_ID
from stages.train.monitoring.health import warnings_now
from stages.train.monitoring.metrics_log import copy_logs

FINISHED = "finished"


def publish_policy(run: Run, draft: Draft, context: Context) -> None:
    """Publish the last weights, or with `train.save_best` the best. `draft` is the working folder. Every rank calls this."""
    finished = replace(draft, path=draft.path / FINISHED)
    with writing(draft.final), removed_on_failure(finished.path):
        _publish(run, draft, finished, context)


def _publish(run: Run, draft: Draft, finished: Draft, context: Context) -> None:
    if run.world.is_main:
        shutil.rmtree(finished.path, ignore_errors=True)
        finished.path.mkdir()
    run.world.barrier()
    best, loss_state = run.best if run.settings.save_best else None, run.loss_state
    if best is not None and best.step != run.last_step:
        checkpoint = _checkpoint_of(run, best.step, draft.path)
        run.policy.load_state(checkpoint, run.optimizer)
        loss_state = Checkpoint.read(checkpoint).state.loss_state
        context.log(f"Publishing the weights of step {best.step}, the best by {run.settings.best_metric}.")
    run.policy.save(finished.path)
    if not run.world.is_main:
        return
    copy_logs(draft.path, finished.path)
    if (draft.path / RUN_ID).is_file():
        shutil.copyfile(draft.path / RUN_ID, finished.path / RUN_ID)
    for step in checkpoint_steps(draft.path)[: run.settings.keep_last]:
        _link(draft.path / f"{PREFIX}{step}", finished.path / f"{PREFIX}{step}")
    name = {} if run.settings.name is None else {"name": run.settings.name}
    counts = _counts(run, best, loss_state)
    if run.settings.model_card:
        write_card(run, counts, finished.path, draft.final.name)
    context.store.publish(finished, counts, {}, context.config_text, policy=run.job.source.name, **name)
    shutil.rmtree(draft.path, ignore_errors=True)  # the next start of this run may remove it too


def _checkpoint_of(run: Run, step: int, working: Path) -> Path:
    """The folder of the checkpoint of a step, in this run or in the run that it continues."""
    parents = [working, *([run.job.origin.folder.parent] if run.job.origin else [])]
    problems = {
        folder: checkpoint_problem(folder) for folder in (parent / f"{PREFIX}{step}" for parent in parents)
    }
    for folder, problem in problems.items():
        if not problem:
            return folder
    raise CorruptError(
        f"The best weights are those of step {step}, and {'; '.join(f'{f}: {p}' for f, p in problems.items())}. "
        f"Publish the last weights instead with --set train.save_best=false --set train.resume={working}."
    )


def remove_leftovers(policy: Artifact) -> None:
    """Remove the working folder of a run that was killed after it had published its policy."""
    working = policy.path.with_name(f"{TEMPORARY_PREFIX}{policy.path.name}")
    shutil.rmtree(working, ignore_errors=True)


def _counts(run: Run, best: Best | None, loss_state: dict[str, float]) -> dict[str, Any]:
    evaluations = [line for line in run.history if any(name.startswith("eval/") for name in line)]
    final = evaluations[-1:] if best is None else [line for line in evaluations if line["step"] == best.step]
    counts: dict[str, Any] = {
        "steps": run.last_step,
        "examples": run.rows.num_examples,
        "step0": _heldout(evaluations[:1]),
        "final": _heldout(final),
        "audit_max_abs_diff": run.audit_difference,
        "skipped_steps": sum(bool(line.get("skipped")) for line in run.history),
        "warnings": warnings_now(run.history, run.loss),
    }
    if run.loss.keeps_state:
        counts["loss_state"] = loss_state
    if run.best is not None:
        counts["best"] = {"metric": run.settings.best_metric, "step": run.best.step, "value": run.best.value}
    return counts


def _heldout(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The held-out metrics of at most one line, without their prefix."""
    return {
        name.removeprefix("eval/"): value
        for line in lines
        for name, value in line.items()
        if name.startswith("eval/")
    }


def _link(source: Path, target: Path) -> None:
    """Hard links to all files of a folder; copies if the file system has no hard links."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:
                shutil.copyfile(path, place)
