"""Which checkpoint a run continues from, and whether it may.

Without `train.resume` a run continues its own newest valid checkpoint: its folder is named by everything that
changes its weights or metrics, so another configuration is another run and begins at step 0. With
`train.resume` it continues the checkpoint named, whose configuration has to be the same but for how long the run
is, how often it evaluates, logs and saves, and what `train.resume_override` names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cache.artifacts import Store
from cache.errors import CorruptError, StaleError, UsageError
from cache.files import TEMPORARY_PREFIX, read_json
from cache.fingerprint import differing_fields
from stages.runtime.context import Context
from stages.train.checkpoints import (
    FILES,
    STATE,
    Checkpoint,
    checkpoint_problem,
    checkpoint_steps,
    newest_checkpoint,
)
from stages.train.job import Job

# What may differ from the run that is continued: it changes how far and how closely watched, not the steps taken.
MAY_CHANGE = (
    "train.max_steps",
    "train.eval_steps",
    "train.eval_samples",
    "train.best_metric",
    "train.save_best",
    "train.early_stopping_metric",
    "train.early_stopping_patience",
    "train.on_nonfinite",
    "train.sample_steps",
    "eval_sets",
    "samples",
)


def open_origin(path: str, context: Context) -> Checkpoint:
    """The checkpoint that `train.resume` names: a `checkpoint-<step>` folder, or the newest valid one in a folder."""
    folder = Path(path).expanduser()
    found = _named(folder, context)
    if found is None:
        raise StaleError(
            f"train.resume is {path}, and there is no valid checkpoint. Expected a folder checkpoint-<step> that "
            f"`align train` wrote, or a folder of them."
        )
    if "identity" not in found.state:
        raise StaleError(f"{found.folder} does not say which run it belongs to: an older align wrote it.")
    return found


def _named(folder: Path, context: Context) -> Checkpoint | None:
    if (folder / STATE).is_file():
        problem = checkpoint_problem(folder)
        if problem:
            raise CorruptError(f"Cannot continue from {folder}: {problem}. Name an older checkpoint.")
        state = read_json(folder / STATE)
        return Checkpoint(folder, state["step"], state)
    return newest_checkpoint(folder, context.say) if folder.is_dir() else None


def check_origin(job: Job, context: Context) -> None:
    """Raise `StaleError` naming every field in which the job differs from its origin and may not."""
    assert job.origin is not None, "a run without train.resume has no origin"
    differing = _fields(job.origin.state["identity"], job.own_identity)
    refused = _without(differing, [*MAY_CHANGE, *job.settings.resume_override])
    if refused:
        names = ",".join(refused)
        raise StaleError(
            f"{job.origin.folder} belongs to a run with other settings: {'; '.join(differing[name] for name in refused)}. "
            f"Continue it in spite of that with --set train.resume_override=[{names}], or leave train.resume out "
            f"to train from step 0."
        )
    if job.origin.step > job.plan.steps:
        raise UsageError(
            f"{job.origin.folder} is at step {job.origin.step}, and this run has {job.plan.steps} steps. "
            f"Raise train.max_steps, or resume an older checkpoint."
        )
    if differing:
        changes = "; ".join(differing.values())
        context.say(f"Continuing {job.origin.folder} with other settings: {changes}")


def nearest_interrupted(job: Job, store: Store) -> tuple[Path, int, list[str]] | None:
    """Another interrupted run of this policy and loss: its checkpoint, step, and the fields that differ."""
    own = store.folder("policy", job.name, job.identity).name
    found = []
    for folder in (store.root / "policy").glob(f"{TEMPORARY_PREFIX}{job.name}-*"):
        steps = checkpoint_steps(folder)
        if not steps or folder.name == f"{TEMPORARY_PREFIX}{own}":
            continue
        newest = folder / f"checkpoint-{steps[0]}"
        if (newest / FILES).is_file() and (identity := _identity(newest)) is not None:
            found.append((newest, steps[0], list(_fields(identity, job.own_identity).values())))
    return min(found, key=lambda run: len(run[2]), default=None)


def _identity(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says it belongs to; None where it cannot be read: it is another run's, and only mentioned."""
    try:
        return read_json(folder / STATE).get("identity")
    except (CorruptError, OSError, AttributeError):
        return None


def _fields(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """`field: stored -> wanted` by field, for every leaf that differs."""
    stored = {name: value for name, value in stored.items() if name != "continues"}
    return {line.partition(": ")[0]: line for line in differing_fields(stored, wanted)}


def _without(names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The names that neither are allowed nor lie in a block that is."""
    blocks = tuple(allowed)
    return [
        name for name in names if not any(name == block or name.startswith(f"{block}.") for block in blocks)
    ]
