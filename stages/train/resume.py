"""Which checkpoint a run continues from.

Without `train.resume` a run continues its own newest valid checkpoint: its folder is named by everything that
changes its weights or metrics, so another configuration is another run and begins at step 0. With `train.resume` a run
continues the named checkpoint; `preflight.py` checks that the settings allow it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.artifacts import Store
from cache.errors import CorruptError, StaleError
from cache.files import TEMPORARY_PREFIX, read_json
from cache.fingerprint import differing_fields
from cache.ownership import is_claimed
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


def open_origin(path: str, context: Context, key: str = "train.resume") -> Checkpoint:
    """The checkpoint that the setting `key` names: a `checkpoint-<step>` folder, or the newest valid one in a folder."""
    folder = Path(path).expanduser()
    found = _named(folder, context)
    if found is None:
        raise StaleError(
            f"{key}={path} holds no valid checkpoint. Expected a folder checkpoint-<step> written by "
            f"`align train`, or a folder of such folders."
        )
    if found.state.identity is None:
        raise StaleError(
            f"{found.folder} was written by an older version and does not name its run, so it cannot be continued. "
            f"Leave {key} out."
        )
    return found


def _named(folder: Path, context: Context) -> Checkpoint | None:
    if (folder / STATE).is_file():
        problem = checkpoint_problem(folder)
        if problem:
            raise CorruptError(f"{folder} cannot be continued: {problem}. Name an older checkpoint.")
        return Checkpoint.read(folder)
    return newest_checkpoint(folder, context.log) if folder.is_dir() else None


@dataclass(frozen=True)
class InterruptedRun:
    """A run that ended early: its newest checkpoint, and `field: its value -> the job's value` for each difference."""

    checkpoint: Path
    step: int
    differing: list[str]


def nearest_interrupted(job: Job, store: Store) -> InterruptedRun | None:
    """The interrupted run of this policy and loss whose settings differ least from the job's."""
    own = store.folder("policy", job.name, job.identity).name
    found = []
    for folder in (store.root / "policy").glob(f"{TEMPORARY_PREFIX}{job.name}-*"):
        steps = checkpoint_steps(folder)
        if not steps or folder.name == f"{TEMPORARY_PREFIX}{own}" or is_claimed(folder):
            continue
        newest = folder / f"checkpoint-{steps[0]}"
        if (newest / FILES).is_file() and (identity := _identity(newest)) is not None:
            differing = list(differing_settings(identity, job.own_identity).values())
            found.append(InterruptedRun(newest, steps[0], differing))
    return min(found, key=lambda run: len(run.differing), default=None)


def _identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the run that wrote a checkpoint; None if it cannot be read, as it is only shown."""
    try:
        return read_json(folder / STATE).get("identity")
    except (CorruptError, OSError, AttributeError):
        return None


def differing_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """`field: stored -> wanted` by the name of the field, for each field that differs."""
    stored = {name: value for name, value in stored.items() if name != "continues"}
    return {line.partition(": ")[0]: line for line in differing_fields(stored, wanted)}
