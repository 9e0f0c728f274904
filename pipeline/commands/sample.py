"""`align sample`: generates completions of the policy, and of the reference to compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, Intent
from pipeline.quickstart_world import is_preferred

if TYPE_CHECKING:
    from cache.artifacts import Artifact
    from pipeline.inputs import Inputs

SHOWN_PROMPTS = 5
MAX_CHARACTERS = 240
FILE = "completions.jsonl"


@dataclass(frozen=True)
class Sampled:
    """The completions artifact of each side. For the quickstart, `show` also counts the polite completions."""

    artifacts: "Mapping[str, Artifact]"
    reused: bool
    is_quickstart: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        sides = {
            side: {
                "artifact": str(artifact.path),
                "fingerprint": artifact.fingerprint,
                "output": str(artifact.path / FILE),
                **artifact.counts,
            }
            for side, artifact in self.artifacts.items()
        }
        known = {"quickstart": True} if self.is_quickstart else {}
        return {"reused": self.reused, "completions": sides, **known}

    def show(self, console: Console) -> None:
        """Print counts, and the completions of a few prompts side by side."""
        from stages.generation.completion_files import read_jsonl

        lines = {}
        for side, artifact in self.artifacts.items():
            counts = artifact.counts
            of = "" if counts["prompt_set"] == "prompts" else f" of {counts['prompt_set']}"
            what = (
                f"{side}: {counts['num_completions']:,} completions of {counts['num_prompts']:,} prompts{of} by "
                f"{counts['engine']}, {counts['finished']:,} ended"
            )
            tables.headline(console, "sample", what, artifact.path, self.reused)
            lines[side] = read_jsonl(artifact.path / FILE)
        left_out = next(iter(self.artifacts.values())).counts["left_out"]
        if left_out:
            rest = f" (and {len(left_out) - 1:,} more)" if len(left_out) > 1 else ""
            console.print(f"  left out: {left_out[0]}{rest}", markup=False)
        console.print(_side_by_side(lines))
        for side, own in lines.items() if self.is_quickstart else ():
            share = sum(is_preferred(line["completion"]) for line in own) / len(own)
            console.print(f"  polite answers, {side}: {share:.0%} of {len(own)}")


def _side_by_side(lines: Mapping[str, list[dict[str, Any]]]) -> Table:
    table = Table(show_lines=True, expand=False)
    table.add_column("prompt", ratio=2)
    for side in lines:
        table.add_column(side, ratio=3)
    first = [[line for line in own if line["sample_index"] == 0] for own in lines.values()]
    for row in list(zip(*first, strict=True))[:SHOWN_PROMPTS]:
        table.add_row(_one_line(row[0]["prompt"]), *(_one_line(line["completion"]) for line in row))
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
    found = find_completions(job, context)
    if found:
        context.log(f"sample: already done, {', '.join(str(one.path) for one in found.values())}")
    return Sampled(found or make_completions(job, context), bool(found), inputs.is_quickstart)


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
