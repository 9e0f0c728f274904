"""The model card of a policy: README.md and a picture of its curves, as the Hugging Face hub shows them.

In: a finished run and its counts. Out: two files in the folder of the policy. Paths of this machine are not in them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.curves.charts import MAIN
from stages.curves.draw import DrawnRun, png
from stages.train.job import Job
from stages.train.loop import Run

CARD, PICTURE = "README.md", "curves.png"
SHOWN = (
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("loss", "loss"),
    ("logps/chosen", "log-prob of the chosen completion"),
    ("logps/rejected", "log-prob of the rejected completion"),
    ("length_bias", "length bias"),
)
FULL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def write_card(run: Run, counts: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write the card and the picture into `folder`; `name` is that of the policy."""
    job = run.job
    heldout = job.rows.counts["examples"]["heldout"]
    drawn = DrawnRun(name, run.history, min(heldout, run.settings.eval_samples or heldout))
    (folder / PICTURE).write_bytes(png(MAIN, [drawn], legend=False))
    title = job.settings.name or name
    ModelCard(f"---\n{_data(job, counts, title).to_yaml()}\n---\n\n{_text(job, counts, title)}").save(
        folder / CARD
    )


def _data(job: Job, counts: Mapping[str, Any], title: str) -> ModelCardData:
    hub_data = [name for name in _data_names(job) if name.count("/") == 1]
    accuracy = counts["final"].get("rewards/accuracies")
    result = EvalResult(
        task_type="text-generation",
        dataset_type="preferences",
        dataset_name="held-out preferences",
        metric_type="accuracy",
        metric_value=accuracy,
        metric_name="accuracy of the implicit reward",
    )
    return ModelCardData(
        base_model=job.source.name if "/" in (_public(job.source.name) or "") else None,
        datasets=hub_data or None,
        library_name="transformers" if job.adapter.name == "none" else "peft",
        pipeline_tag="text-generation",
        tags=["align", "preference-optimization", job.loss.model_dump()["name"]],
        model_name=title,
        eval_results=None if accuracy is None else [result],
    )


def _text(job: Job, counts: Mapping[str, Any], title: str) -> str:
    loss = job.loss.model_dump()
    use = FULL if job.adapter.name == "none" else ADAPTER
    return f"""\
# {title}

{_public(job.source.name) or "A local model"}, trained with the loss `{loss["name"]}` on {counts["examples"]:,} examples of {", ".join(_data_names(job)) or "local data"}.

## Metrics

{_metrics(counts)}

![held-out accuracy, margin and log-ratios over the steps]({PICTURE})

## Training

{_table(_settings(job))}

## Use

```python
{use.replace("FOLDER", title)}
```

## How to reproduce

`config.yaml` beside this card is the whole configuration, `manifest.json` has what it was made of and the versions.

```
align prepare -c config.yaml
align cache-ref -c config.yaml
align train -c config.yaml
```
"""


def _metrics(counts: Mapping[str, Any]) -> str:
    before, after = counts["step0"], counts["final"]
    rows = {
        label: f"{before[key]:.4f} | {after[key]:.4f}" if key in before else f" | {after[key]:.4f}"
        for key, label in SHOWN
        if key in after
    }
    if not rows:
        return "There were no held-out examples."
    lines = [f"| {label} | {cells} |" for label, cells in rows.items()]
    warned = [f"\nWarning: {warning}." for warning in counts.get("warnings", [])]
    return "\n".join(["| held out | before | after |", "|---|---|---|", *lines, *warned])


def _settings(job: Job) -> dict[str, Any]:
    loss, resolved, settings = job.loss.model_dump(), job.resolved, job.settings
    adapter = _listed(job.adapter.model_dump()) if job.adapter.name != "none" else "none: all weights"
    return {
        "loss": _listed(loss),
        "learning rate": f"{resolved.learning_rate:g}, {settings.lr_scheduler_type}, warm-up {settings.warmup_ratio:g}",
        "examples in a step": resolved.batch_size,
        "steps": resolved.steps,
        "optimizer": settings.optimizer,
        "seed": settings.seed,
        "adapter": adapter,
        "forward pass": f"{job.compute.arithmetic}, weights float32",
        "examples": f"{job.rows.counts['examples']['train']:,} for training, {job.rows.counts['examples']['heldout']:,} held out",
    }


def _listed(values: Mapping[str, Any]) -> str:
    """A block in one line, its name first; blocks within it are in brackets."""
    shown = {key: value for key, value in values.items() if value is not None}
    named = {"name": shown.pop("name"), **shown} if "name" in shown else shown
    return ", ".join(f"{key} {_inner(value)}" for key, value in named.items())


def _inner(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    if isinstance(value, list | tuple):
        return " ".join(map(_inner, value))
    return str(value)


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _data_names(job: Job) -> list[str]:
    """Hub names as they are, files by their name alone."""
    names = job.rows.manifest["provenance"].get("data_paths", [])
    return [_public(name) or Path(name).name for name in names]


def _public(name: str) -> str | None:
    """A name on the hub; None for a path of this machine."""
    return None if Path(name).expanduser().exists() or name.startswith(("/", "~", ".")) else name
