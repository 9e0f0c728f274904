"""The log of a run: `metrics.jsonl`, and the dashboards that are enabled.

`metrics.jsonl` has one line for each logged step, in order, none twice: a run that continues from a checkpoint begins
with the checkpoint's copy. Dashboards receive the step of each point, so repeated steps overwrite their points.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.runtime.limits import writing
from stages.train.monitoring.dashboards import Dashboard

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class Tracker:
    """Appends one line per logged step to `metrics.jsonl` and sends it to the dashboards."""

    def __init__(self, folder: Path | None, dashboards: Sequence[Dashboard] = ()) -> None:
        """Write into `folder`; None on all ranks but the first, which write nothing."""
        self._folder, self._dashboards = folder, dashboards

    def begin(self, checkpoint: Path | None) -> None:
        """Begin with copies of the files of a checkpoint, or with none."""
        if self._folder is None:
            return
        with writing(self._folder):
            for name in (METRICS, SAMPLES):
                (self._folder / name).unlink(missing_ok=True)
            if checkpoint is not None:
                copy_logs(checkpoint, self._folder)

    def log(self, line: Mapping[str, Any]) -> None:
        """Record the metrics of a step under their plain names (`step`, `loss`, `eval/loss`)."""
        if self._folder is not None:
            _append(self._folder / METRICS, [line])
        metrics = {
            name if name.startswith(("eval/", "samples/")) else f"train/{name}": value
            for name, value in line.items()
            if name != "step" and value is not None
        }
        for dashboard in self._dashboards:
            dashboard.log(line["step"], metrics)

    def log_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Record the completions sampled at one step, each with its `step`."""
        if self._folder is not None:
            _append(self._folder / SAMPLES, records)
        for dashboard in self._dashboards:
            dashboard.log_table(records[0]["step"], "samples", records)

    def close(self) -> None:
        """Finish the dashboards' runs."""
        for dashboard in self._dashboards:
            dashboard.close()


def copy_logs(source: Path, target: Path) -> None:
    """Copy the log files that `source` has into `target`."""
    for name in (METRICS, SAMPLES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order, without a last line that was not written to its end."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(_json_line, lines)))


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
