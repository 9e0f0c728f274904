"""Checkpoints of a training run: whole or absent, checked before use, newest valid one first.

`checkpoint-<step>/` is a Hugging Face folder (safetensors in float32, configuration, tokenizer; an adapter in peft's
layout) with the optimizer beside it (under `train.parallel: fsdp` shards of optimizer and weights), the metrics so far
(`metrics.jsonl`) and `state.json`. The sha256 of each file is written last, into `files.json`, and the folder is
renamed into place.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import CorruptError
from cache.files import TEMPORARY_PREFIX, publish_folder, read_json, sha256_file, write_json
from stages.runtime.distributed import World

FILES = "files.json"
STATE = "state.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class RunState:
    """What continues a run besides weights, optimizer and logs; `identity` is the run's, None in an old checkpoint."""

    loss_state: dict[str, float]
    audit_max_abs_diff: float | None
    identity: Mapping[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A finished step, as found on disk and checked."""

    folder: Path
    step: int
    state: RunState

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`, whose files are known to be as written."""
        fields = read_json(folder / STATE)
        state = RunState(fields["loss_state"], fields["audit_max_abs_diff"], fields.get("identity"))
        return cls(folder, fields["step"], state)

    @property
    def sha256(self) -> str:
        """One digest for the whole checkpoint: of the list of its files' digests."""
        return sha256_file(self.folder / FILES)


def save_checkpoint(
    root: Path, step: int, state: RunState, write: Callable[[Path], None], world: World
) -> None:
    """Write `checkpoint-<step>` under `root`; `write` puts weights, optimizer and metrics into a folder.

    All ranks call, and so does `write`; the first rank lists the files and renames the folder into place.
    """
    final = root / f"{PREFIX}{step}"
    staging = root / f"{TEMPORARY_PREFIX}{final.name}"
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
        if final.is_dir():  # a damaged one, or it would have been continued from
            shutil.rmtree(final)
        publish_folder(staging, final)


def remove_old(root: Path, keep_last: int, keep: Iterable[int] = ()) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of the steps in `keep`."""
    steps = sorted(checkpoint_steps(root))
    for step in steps[: len(steps) - keep_last]:
        if step not in set(keep):
            shutil.rmtree(root / f"{PREFIX}{step}")


def checkpoint_steps(root: Path) -> list[int]:
    """The steps of all checkpoints under `root`, newest first, whether valid or not."""
    names = [folder.name.removeprefix(PREFIX) for folder in root.glob(f"{PREFIX}*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest_checkpoint(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are all as written; damaged newer ones are named and passed over."""
    for step in checkpoint_steps(root):
        folder = root / f"{PREFIX}{step}"
        problem = checkpoint_problem(folder)
        if not problem:
            return Checkpoint.read(folder)
        say(f"Passing over {folder}: {problem}")
    return None


def checkpoint_problem(folder: Path) -> str:
    """What is wrong with a checkpoint's files, in a few words; empty when nothing is."""
    if not (folder / FILES).is_file():
        return f"it has no {FILES}, so it was never finished"
    try:
        listed = read_json(folder / FILES)
    except CorruptError:
        return f"{FILES} is damaged (it is no JSON)"
    if not isinstance(listed, dict) or STATE not in listed:
        return f"{FILES} does not list {STATE}"
    for name, sha256 in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != sha256:
            return f"{name} is damaged (its sha256 is not the one written)"
    return ""
