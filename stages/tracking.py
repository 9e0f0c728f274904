"""Where metrics go: `metrics.jsonl`, always, and Weights & Biases when asked."""

import json
import math
from pathlib import Path
from typing import Any

from cache.errors import MachineError
from stages.settings import TrackSettings


class Tracker:
    """Appends one line a logged step; on resume, lines after the checkpoint are dropped first."""

    def __init__(
        self, path: Path, settings: TrackSettings, run_name: str, config: dict[str, Any], last_step: int
    ) -> None:
        """Write to `path`, keeping its lines up to `last_step`."""
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._path = path
        self._run = None
        if settings.wandb != "disabled":
            self._run = _start_wandb(settings, run_name, config, path.parent)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record metrics of a step under their plain names (`loss`, `eval/loss`)."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._run is not None:
            named = {
                name if name.startswith("eval/") else f"train/{name}": value for name, value in values.items()
            }
            self._run.log({"train/global_step": step, **named})

    def close(self) -> None:
        """Finish the W&B run, if there is one."""
        if self._run is not None:
            self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that was cut, so that it is not kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _start_wandb(settings: TrackSettings, run_name: str, config: dict[str, Any], folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MachineError("track.wandb needs wandb. Install it with: pip install wandb") from error
    run = wandb.init(
        project=settings.project,
        name=settings.run_name or run_name,
        mode=settings.wandb,
        config=config,
        dir=str(folder.parent.parent),
        id=run_name.replace("/", "-")[-60:],
        resume="allow",
    )
    run.define_metric("*", step_metric="train/global_step")
    return run
