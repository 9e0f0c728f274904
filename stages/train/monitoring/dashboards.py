"""Dashboards besides `metrics.jsonl`: Weights & Biases, TensorBoard, trackio.

Metric names are those of transformers' Trainer: `train/...` and `eval/...`, over `train/global_step`. API keys come from
the environment or from the logins of the dashboards.
"""

import importlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cache.artifacts import Artifact
from cache.errors import MachineError
from stages.settings.fields import TrackSettings

STEP = "train/global_step"
RUN_ID = "wandb-id"


class Dashboard(Protocol):
    """A service or a file that receives metrics during a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table; all rows have the same columns."""

    def close(self) -> None:
        """Send what is still buffered and end the run."""


def open_dashboards(
    settings: TrackSettings, folder: Path, run_name: str, config: Mapping[str, Any], last_step: int
) -> list[Dashboard]:
    """The dashboards that `settings` enable. `folder` is that of the run; their logs are in the store above it."""
    stored = folder / RUN_ID
    if settings.wandb != "disabled" and not stored.is_file():
        stored.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return _open(settings, folder, run_name, config, last_step)


def log_to_finished_run(settings: TrackSettings, policy: Artifact, metrics: Mapping[str, float]) -> None:
    """Add metrics to the last step of the run that made `policy`, on the dashboards that `settings` enable.

    A policy that was trained without W&B has no run there; it gets one, named by its folder.
    """
    last_step = policy.counts["steps"]
    for dashboard in _open(settings, policy.path, policy.path.name, policy.manifest["identity"], last_step):
        try:
            dashboard.log(last_step, metrics)
        finally:
            dashboard.close()


def _open(
    settings: TrackSettings, folder: Path, run_name: str, config: Mapping[str, Any], last_step: int
) -> list[Dashboard]:
    name = settings.run_name or run_name
    found: list[Dashboard] = []
    if settings.wandb != "disabled":
        found.append(_Wandb(settings, folder, name, config))
    if settings.tensorboard:
        found.append(_TensorBoard(folder.parent.parent / "tensorboard" / name, last_step))
    if settings.trackio:
        found.append(_Trackio(settings, name, config, last_step))
    return found


class _Wandb:
    """One W&B run for one training run. A file in the run's folder keeps its id for a continued run."""

    def __init__(self, settings: TrackSettings, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb = _require("wandb", "track.wandb")
        stored = folder / RUN_ID
        self._wandb = wandb
        self._run = wandb.init(
            project=settings.project,
            name=name,
            mode=settings.wandb,
            config=dict(config),
            dir=str(folder.parent.parent),
            id=stored.read_text(encoding="utf-8") if stored.is_file() else folder.name,
            resume="allow",
        )
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({STEP: step, **metrics})

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({STEP: step, name: self._wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in `<store>/tensorboard/<run>`; a continued run purges the steps it repeats."""

    def __init__(self, folder: Path, last_step: int) -> None:
        _require("tensorboard", "track.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "\n\n".join("\n\n".join(f"**{key}** {value}" for key, value in row.items()) for row in rows)
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """trackio, whose interface is that of W&B; local unless its environment variables name a server."""

    def __init__(self, settings: TrackSettings, name: str, config: Mapping[str, Any], last_step: int) -> None:
        self._trackio = _require("trackio", "track.trackio")
        resume = "never" if last_step < 0 else "allow"
        self._run = self._trackio.init(settings.project, name=name, config=dict(config), resume=resume)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import pandas

        self._run.log({name: self._trackio.Table(dataframe=pandas.DataFrame(list(rows)))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _require(package: str, key: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MachineError(f"{key} needs {package}. Install it with: pip install {package}") from error
