"""Checkpoints of a training run: written whole, verified before use.

`checkpoint-<step>/` is a Hugging Face folder (safetensors in float32, configuration, tokenizer; an adapter in peft's
layout) with the optimizer (under `train.parallel: fsdp` shards of optimizer and weights), the metrics so far
(`metrics.jsonl`) and `state.json`. `files.json` lists the sha256 of each file; it is written last, and then the folder
is renamed into place.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.artifacts import is_artifact, open_artifact
from cache.errors import CorruptError
from cache.files import TEMPORARY_PREFIX, publish_folder, read_json, sha256_file, write_json
from cache.fingerprint import canonical_json, differing_fields
from stages.runtime.distributed import World
from stages.runtime.limits import writing

FILES = "files.json"
STATE = "state.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class RunState:
    """What a run needs to continue besides weights, optimizer and logs.

    `identity` is that of the run; None in a checkpoint of an older version.
    """

    loss_state: dict[str, float]
    audit_max_abs_diff: float | None
    identity: Mapping[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are verified."""

    folder: Path
    step: int
    state: RunState

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`, whose files have to be verified before."""
        fields = read_json(folder / STATE)
        state = RunState(fields["loss_state"], fields["audit_max_abs_diff"], fields.get("identity"))
        return cls(folder, fields["step"], state)

    @property
    def sha256(self) -> str:
        """The digest of the whole checkpoint: that of the list of digests of its files."""
        return sha256_file(self.folder / FILES)


def save_checkpoint(
    root: Path, step: int, state: RunState, write: Callable[[Path], None], world: World
) -> None:
    """Write `checkpoint-<step>` under `root`; `write` writes weights, optimizer and metrics into a folder.

    Every rank calls this and `write`; the first rank lists the files and renames the folder into place.
    """
    final = root / f"{PREFIX}{step}"
    staging = root / f"{TEMPORARY_PREFIX}{final.name}"
    with writing(final), removed_on_failure(staging):
        _write_checkpoint(staging, final, step, state, write, world)


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder that could not be finished: where the disk is full, the space is needed."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_checkpoint(
    staging: Path, final: Path, step: int, state: RunState, write: Callable[[Path], None], world: World
) -> None:
    if world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    world.barrier()
    write(staging)
    world.barrier()
    if world.is_main:
        write_json(staging / STATE, {"step": step, **vars(state)})
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        digests = {str(path.relative_to(staging)): sha256_file(path) for path in files}
        write_json(staging / FILES, digests)
        if final.is_dir():  # damaged, or the run would have continued from it
            shutil.rmtree(final)
        publish_folder(staging, final)


def remove_old(root: Path, keep_last: int, keep: Iterable[int] = ()) -> None:
    """Remove all checkpoints except the newest `keep_last` and those of the steps in `keep`."""
    steps = sorted(checkpoint_steps(root))
    for step in steps[: len(steps) - keep_last]:
        if step not in set(keep):
            shutil.rmtree(root / f"{PREFIX}{step}")


def checkpoint_steps(root: Path) -> list[int]:
    """The steps of all checkpoints under `root`, valid or not, newest first."""
    names = [folder.name.removeprefix(PREFIX) for folder in root.glob(f"{PREFIX}*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest_checkpoint(
    root: Path, log: Callable[[str], None], identity: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """The newest checkpoint whose files are all as written; damaged newer ones are reported and skipped.

    So are those of runs with another `identity`, if that is given.
    """
    for step in checkpoint_steps(root):
        folder = root / f"{PREFIX}{step}"
        problem = checkpoint_problem(folder)
        if not problem:
            found = Checkpoint.read(folder)
            problem = "" if identity is None else _foreign(found, identity)
            if not problem:
                return found
        log(f"Skipping {folder}: {problem}")
    return None


def _foreign(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> str:
    """Why a checkpoint is not of the run with this identity, as a clause; empty if it is."""
    stored = checkpoint.state.identity
    if stored is None:
        return "it was written by an older version and does not name its run"
    # Through JSON, because the settings of a run hold tuples.
    fields = differing_fields(stored, json.loads(canonical_json(identity)))
    if not fields:
        return ""
    return f"it belongs to a run with other settings ({'; '.join(fields)})"


def check_model_files(folder: Path) -> None:
    """Compare the files of a policy or checkpoint with what was written; raises `StaleError` or `CorruptError`.

    The folder of any other model is not checked.
    """
    if is_artifact(folder):
        open_artifact(folder).check_files()
    elif (folder / STATE).is_file() and (problem := checkpoint_problem(folder)):
        raise CorruptError(f"{folder} cannot be used: {problem}. Name another checkpoint.")


def checkpoint_problem(folder: Path) -> str:
    """The first problem found with a checkpoint's files, as a clause; empty if there is none."""
    if not (folder / FILES).is_file():
        return f"{FILES} is missing, so the checkpoint was never finished"
    try:
        listed = read_json(folder / FILES)
    except CorruptError:
        return f"{FILES} is damaged (not JSON)"
    if not isinstance(listed, dict) or STATE not in listed:
        return f"{FILES} does not list {STATE}"
    for name, sha256 in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != sha256:
            return f"{name} is damaged (its sha256 differs from the one in {FILES})"
    return ""
