"""Training runs as a report shows them: what is in their folders, and what belongs to them in the store.

In: folders of policies, of unfinished trainings or of sweeps. Out: `ReportedRun`s with labels that tell them apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from cache.artifacts import open_artifact
from cache.errors import UsageError
from cache.files import read_json
from pipeline import yaml_1_2
from pipeline.catalogue.differences import flat
from pipeline.catalogue.entries import Catalogue, Entry, entry_of
from pipeline.sweep.members import short_name, shown
from stages.curves.charts import points
from stages.curves.draw import DASHES, PALETTE, DrawnRun
from stages.generation.completion_files import FILE as COMPLETIONS
from stages.generation.completion_files import read_jsonl
from stages.train.monitoring.metrics_log import METRICS, SAMPLES, read_metrics

SWEEP = "results.json"
# Blocks without an effect on a training, which differ without meaning.
NO_TRAINING = ("sample", "judge", "online", "sweep", "track", "eval", "compute")
# What names a run first, if it differs.
FIRST = ("loss.name", "loss.beta", "train.learning_rate", "train.batch_size", "adapter.name", "train.seed")


@dataclass
class ReportedRun:
    """One run; `entry` has no manifest for a training that is not finished. `label` and `style` are given by `open_runs`."""

    folder: Path
    entry: Entry
    catalogue: Catalogue
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    label: str = ""
    style: int = 0

    @property
    def counts(self) -> Mapping[str, Any]:
        """The counts of its manifest; empty while it is not finished."""
        return self.entry.manifest.get("counts", {})

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its fingerprint hashes; empty while it is not finished."""
        return self.entry.manifest.get("identity", {})

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Time, command, machine and versions."""
        return self.entry.manifest.get("provenance", {})

    @cached_property
    def rows(self) -> Entry | None:
        """The rows it was trained on, if they are in the store."""
        return next((one for one in self.catalogue.inputs(self.entry) if one.kind == "rows"), None)

    @cached_property
    def reference(self) -> Entry | None:
        """The store of reference log-probs it read."""
        return next((one for one in self.catalogue.inputs(self.entry) if one.kind == "ref-logps"), None)

    @cached_property
    def heldout(self) -> int:
        """Held-out examples of an evaluation; 0 if it is not known."""
        if self.rows is None:
            return 0
        there = self.rows.manifest["counts"]["examples"]["heldout"]
        return min(there, self.config.get("train", {}).get("eval_samples") or there)

    @property
    def drawn(self) -> DrawnRun:
        """As pictures take it."""
        return DrawnRun(self.label, self.lines, self.heldout, self.style)

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        values = points(self.lines, metric)[1]
        return values[-1] if values else None

    @property
    def examples_per_second(self) -> float | None:
        """Examples trained in a second of the median step."""
        batch = self.identity.get("train", {}).get("batch_size") or self.config.get("train", {}).get(
            "batch_size"
        )
        seconds = points(self.lines, "step_seconds")[1]
        return batch / median(seconds) if batch and seconds and median(seconds) else None

    def completions(self) -> dict[str, str]:
        """Completions by prompt: the last samples of the training, or what `align sample` made of the policy."""
        samples = self.folder / SAMPLES
        if samples.is_file():
            lines = read_metrics(samples)
            return {line["prompt"]: line["completion"] for line in lines if line["step"] == lines[-1]["step"]}
        made = [one for one in self.catalogue.consumers(self.entry) if one.kind == "completions"]
        found: dict[str, str] = {}
        for entry in made[-1:]:
            for line in read_jsonl(entry.path / COMPLETIONS):
                found.setdefault(_prompt_text(line["prompt"]), line["completion"])
        return found

    def win_rates(self) -> list[str]:
        """Its win-rates with judge and baseline, from verdicts in the store."""
        from pipeline.comparison.figures import win_lines
        from stages.compare.comparison import Against
        from stages.compare.verdicts import read_verdicts

        found = []
        for entry in self.catalogue.entries:
            named = entry.manifest.get("inputs", {})
            if entry.kind == "verdicts" and named.get("completion") == self.folder.name:
                against = Against.of(read_verdicts(entry.path))
                rate = win_lines(against).get("win-rate")
                found += [f"{rate} against {named['baseline']}, judged by {against.judge}"] if rate else []
        return found


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)


def open_runs(folders: Sequence[Path], by: str | None) -> list[ReportedRun]:
    """The runs in these folders, labelled by what differs; `by` is a configuration key whose values get a colour each."""
    catalogues: dict[Path, Catalogue] = {}
    runs = []
    for folder in dict.fromkeys(part.resolve() for path in folders for part in _runs_of(path)):
        root = folder.parent.parent
        catalogue = catalogues.setdefault(root, Catalogue(root))
        runs.append(_open(folder, catalogue))
    _label(runs)
    _style(runs, by)
    return runs


def _runs_of(path: Path) -> list[Path]:
    """The policies of a sweep, or the folder itself."""
    if not (path / SWEEP).is_file():
        return [path]
    trained = [one["artifact"] for one in read_json(path / SWEEP)["trainings"]]
    # The store may have been moved, or be another folder away than when the sweep ran.
    return [path.parent.parent / "policy" / Path(one).name for one in trained if one is not None]


def _open(folder: Path, catalogue: Catalogue) -> ReportedRun:
    if not (folder / METRICS).is_file():
        raise UsageError(
            f"{folder} has no {METRICS}, so it is no training run. Name a folder of policy/ or of sweeps/ in the store."
        )
    own = next((entry for entry in catalogue.entries if entry.path.resolve() == folder), None)
    if own is None:  # not finished, or alone outside a store
        own = entry_of(folder) if (folder / "manifest.json").is_file() else Entry(folder, "policy", {})
    else:
        open_artifact(folder)  # a manifest that was changed is an error
    text = folder / "config.yaml"
    config = yaml_1_2.load(text.read_text(encoding="utf-8")) if text.is_file() else {}
    return ReportedRun(folder, own, catalogue, config, read_metrics(folder / METRICS))


def settings_of(run: ReportedRun) -> dict[str, Any]:
    """What a run was trained with, by dotted keys, with the numbers that defaults came to."""
    tree = {block: values for block, values in run.config.items() if block not in NO_TRAINING}
    resolved = run.identity.get("train", {})
    found = flat(tree)
    found |= {
        f"train.{key}": resolved[key]
        for key in ("learning_rate", "batch_size", "eval_steps")
        if key in resolved
    }
    return found


def differences(runs: Sequence[ReportedRun]) -> dict[str, list[Any]]:
    """The settings in which runs differ: a value for each run, None where a run has no such key."""
    settings = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for own in settings for key in own)
    order = sorted(keys, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    return {
        key: values
        for key in order
        for values in [[own.get(key) for own in settings]]
        if key != "train.name" and any(value != values[0] for value in values)
    }


def _label(runs: Sequence[ReportedRun]) -> None:
    """Its name, or the values of the most telling keys that differ; the folder where these are not unique."""
    different = differences(runs)
    keys = [key for key in different if key in FIRST] or list(different)[:3]
    for place, run in enumerate(runs):
        parts = [
            shown(different[key][place]) if key in ("loss.name", "adapter.name") else f"{short_name(key, keys)} {shown(different[key][place])}"
            for key in keys
            if different[key][place] is not None
        ]  # fmt: skip
        run.label = run.entry.run_name or ", ".join(parts) or run.folder.name
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({run.folder.name.rpartition('-')[2][:6]})"


def _style(runs: Sequence[ReportedRun], by: str | None) -> None:
    """A colour for each run, or for each value of one key and another dash for each run with the same value."""
    settings = [settings_of(run) for run in runs]
    if by is not None and not any(by in own for own in settings):
        raise UsageError(
            f"--by {by}: no run has this key. Keys that differ: {', '.join(differences(runs)) or 'none'}."
        )
    if by is None and len(runs) <= len(PALETTE):
        for place, run in enumerate(runs):
            run.style = place
        return
    different = differences(runs)
    by = by or next(
        (key for key in different if len({str(value) for value in different[key]}) <= len(PALETTE)), None
    )
    values = [str(own.get(by)) if by else str(place) for place, own in enumerate(settings)]
    order = list(dict.fromkeys(values))
    seen: dict[str, int] = {}
    for run, value in zip(runs, values, strict=True):
        dash = seen.get(value, 0)
        seen[value] = dash + 1
        run.style = order.index(value) % len(PALETTE) + len(PALETTE) * (dash % len(DASHES))
