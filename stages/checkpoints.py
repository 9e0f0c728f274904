"""Checkpoints of a training run: whole or absent, checked before use, newest valid one first.

`checkpoint-<step>/` holds `training.pt` (float32 weights and optimizer state) and `state.json`; the
sha256 of each file is written last and the folder is renamed into place.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.files import TEMPORARY_PREFIX, publish_folder, read_json, sha256_file, write_json

FILES = "files.json"


@dataclass(frozen=True)
class Checkpoint:
    """A finished step, as found on disk."""

    folder: Path
    step: int
    loss_state: dict[str, float]


def save_checkpoint(
    root: Path, step: int, state: Any, write_state: Callable[[Path], None], world: Any
) -> None:
    """Write `checkpoint-<step>` under `root`, then remove older ones."""
    final = root / f"checkpoint-{step}"
    staging = root / f"{TEMPORARY_PREFIX}{final.name}"
    if world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    world.barrier()
    write_state(staging)
    world.barrier()
    if not world.is_main:
        return
    write_json(staging / "state.json", {"step": step, **state})
    write_json(staging / FILES, {path.name: sha256_file(path) for path in sorted(staging.iterdir())})
    shutil.rmtree(final, ignore_errors=True)
    publish_folder(staging, final)
    for folder in root.glob("checkpoint-*"):
        if folder != final:
            shutil.rmtree(folder)


def newest_checkpoint(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are all as written; damaged newer ones are named and passed over."""
    folders = sorted(
        root.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True
    )
    for folder in folders:
        problem = _problem(folder)
        if not problem:
            state = read_json(folder / "state.json")
            return Checkpoint(folder, state["step"], state["loss_state"])
        say(f"Passing over {folder}: {problem}")
    return None


def _problem(folder: Path) -> str:
    if not (folder / FILES).is_file():
        return f"it has no {FILES}, so it was never finished"
    for name, sha256 in read_json(folder / FILES).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != sha256:
            return f"{name} is damaged (its sha256 is not the one written)"
    return ""
