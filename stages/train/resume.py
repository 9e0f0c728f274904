"""Which checkpoint a run continues from, and whether it may.

Without `train.resume` a run continues its own newest valid checkpoint: its folder is named by everything that
changes its weights or metrics, so another configuration is another run and begins at step 0. With
`train.resume` it continues the checkpoint named, whose configuration has to be the same but for how long the run
is, how often it evaluates, logs and saves, and what `train.resume_override` names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.artifacts import Store
from cache.errors import CorruptError, StaleError
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


def open_origin(path: str, context: Context) -> Checkpoint:
    """The checkpoint that `train.resume` names: a `checkpoint-<step>` folder, or the newest valid one in a folder."""
    folder = Path(path).expanduser()
    found = _named(folder, context)
    if found is None:
        raise StaleError(
            f"train.resume is {path}, and there is no valid checkpoint. Expected a folder checkpoint-<step> that "
            f"`align train` wrote, or a folder of them."
        )
    if found.state.identity is None:
        raise StaleError(f"{found.folder} does not say which run it belongs to: an older align wrote it.")
    return found


def _named(folder: Path, context: Context) -> Checkpoint | None:
    if (folder / STATE).is_file():
        problem = checkpoint_problem(folder)
        if problem:
            raise CorruptError(f"Cannot continue from {folder}: {problem}. Name an older checkpoint.")
        return Checkpoint.read(folder)
    return newest_checkpoint(folder, context.say) if folder.is_dir() else None


@dataclass(frozen=True)
class InterruptedRun:
    """A run that ended early: its newest checkpoint, and `field: its value -> the wanted value` where they differ."""

    checkpoint: Path
    step: int
    differing: list[str]


def nearest_interrupted(job: Job, store: Store) -> InterruptedRun | None:
    """The interrupted run of this policy and loss whose settings differ least from the job's."""
    own = store.folder("policy", job.name, job.identity).name
    found = []
    for folder in (store.root / "policy").glob(f"{TEMPORARY_PREFIX}{job.name}-*"):
        steps = checkpoint_steps(folder)
        if not steps or folder.name == f"{TEMPORARY_PREFIX}{own}":
            continue
        newest = folder / f"checkpoint-{steps[0]}"
        if (newest / FILES).is_file() and (identity := _identity(newest)) is not None:
            differing = list(differing_settings(identity, job.own_identity).values())
            found.append(InterruptedRun(newest, steps[0], differing))
    return min(found, key=lambda run: len(run.differing), default=None)


def _identity(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says it belongs to; None where it cannot be read: it is another run's, and only mentioned."""
    try:
        return read_json(folder / STATE).get("identity")
    except (CorruptError, OSError, AttributeError):
        return None


def differing_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """`field: stored -> wanted` by field, for every leaf that differs."""
    stored = {name: value for name, value in stored.items() if name != "continues"}
    return {line.partition(": ")[0]: line for line in differing_fields(stored, wanted)}
