"""`align sample`: generates completions of the policy, and of the reference to compare."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, Intent, StageResult, found_or_made
from pipeline.quickstart_world import is_preferred

if TYPE_CHECKING:
    from pipeline.inputs import Inputs

SHOWN_PROMPTS = 5
MAX_CHARACTERS = 240


@dataclass(frozen=True)
class Sampled(StageResult):
    """The completions artifact. For the quickstart, `show` also counts the polite completions."""

    is_quickstart: bool

    @property
    def output(self) -> Path:
        """The JSONL file of completions."""
        return self.artifact.path / "completions.jsonl"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        known = {"quickstart": True} if self.is_quickstart else {}
        return {**super().as_json(), "output": str(self.output), **known}

    def show(self, console: Console) -> None:
        """Print counts, and the completions of a few prompts side by side."""
        from stages.generation.completion_files import read_jsonl

        counts = self.artifact.counts
        what = (
            f"{counts['num_completions']:,} completions of {counts['num_prompts']:,} prompts with {counts['engine']}, "
            f"{counts['finished']:,} finished before sample.max_tokens"
        )
        tables.headline(console, "sample", what, self.artifact.path, self.reused)
        if counts.get("prompts_too_long"):
            console.print(f"  too long for the model, left out: {', '.join(counts['prompts_too_long'])}")
        lines = read_jsonl(self.output)
        sides = sorted(counts["models"], reverse=True)
        console.print(_side_by_side(lines, sides))
        for side in sides if self.is_quickstart else ():
            own = [line["completion"] for line in lines if line["side"] == side]
            share = sum(map(is_preferred, own)) / len(own)
            console.print(f"  polite answers, {side}: {share:.0%} of {len(own)}")


def _side_by_side(lines: list[dict[str, Any]], sides: list[str]) -> Table:
    table = Table(show_lines=True, expand=False)
    table.add_column("prompt", ratio=2)
    for side in sides:
        table.add_column(side, ratio=3)
    first: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["sample_index"] == 0:
            first.setdefault(line["id"], {"prompt": line["prompt"]})[line["side"]] = line["completion"]
    for entry in list(first.values())[:SHOWN_PROMPTS]:
        table.add_row(_one_line(entry["prompt"]), *(_one_line(entry.get(side, "")) for side in sides))
    return table


def _one_line(value: Any) -> Text:
    """A text or the contents of messages in one line, at most `MAX_CHARACTERS` of it."""
    shown = value if isinstance(value, str) else " / ".join(str(message["content"]) for message in value)
    shown = " ".join(shown.split())
    return Text(shown if len(shown) <= MAX_CHARACTERS else shown[: MAX_CHARACTERS - 3] + "...")


def sample(inputs: "Inputs") -> Sampled:
    """Stage 4: generate completions of the policy with vLLM or transformers.

    With `--set sample.compare=true`, also of the reference.
    """
    from stages.sample.stage import find_completions
    from stages.sample.stage import sample as make_completions

    job, context = inputs.sample_job, inputs.context
    make = partial(make_completions, job, context)
    artifact, reused = found_or_made("sample", find_completions(job, context), make, context.say)
    return Sampled(artifact, reused, inputs.is_quickstart)


def would_sample(inputs: "Inputs") -> Intent:
    """Count the prompts, and look whether their completions exist."""
    from stages.sample.stage import find_completions

    job = inputs.sample_job
    return Intent(
        "reuse" if find_completions(job, inputs.context) else "generate",
        {"num_prompts": len(job.prompts), "models": [model.name for model in job.models.values()]},
    )


SAMPLE = Command(
    "sample",
    sample,
    examples=("align sample", "align sample --set sample.compare=true --set sample.temperature=0"),
    intent=would_sample,
)
