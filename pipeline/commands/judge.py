"""`align judge`: asks a judge about completions of the policy and of the reference."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from pipeline import tables
from pipeline.commands.command import Command, Intent, StageResult, found_or_made

if TYPE_CHECKING:
    from pipeline.inputs import Inputs
    from stages.compare.comparison import Against


@dataclass(frozen=True)
class JudgedRun(StageResult):
    """The verdicts artifact, and what follows from it."""

    against: "Against"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**super().as_json(), **self.against.as_json()}

    def show(self, console: Console) -> None:
        """Print wins, ties and losses, the win-rate, and what it cost."""
        from pipeline.comparison.figures import notes, win_lines

        counts, models = self.artifact.counts, self.artifact.manifest["inputs"]
        what = f"{counts['pairs']:,} pairs by {self.against.judge}: {models['completion']} against {models['baseline']}"
        tables.headline(console, "judge", what, self.artifact.path, self.reused)
        table = tables.labelled()
        for label, value in win_lines(self.against).items():
            table.add_row(label, value)
        if counts["prompt_tokens"]:
            table.add_row(
                "tokens", f"{counts['prompt_tokens']:,} read, {counts['completion_tokens']:,} written"
            )
            table.add_row("cost", f"{counts['cost']:,.4g}")
        console.print(table)
        for note in notes(self.against):
            console.print(Text(f"  {note}", style="yellow"), soft_wrap=True)


def judge(inputs: "Inputs") -> JudgedRun:
    """Judge the completions of the policy against those of the reference or of `judge.baseline`.

    Asks only what this judge has not answered before.
    """
    from pipeline.judges import judge_job, open_judge, run_pairs
    from stages.compare.comparison import Against
    from stages.compare.verdicts import read_verdicts
    from stages.judge.stage import find_verdicts
    from stages.judge.stage import judge as make_verdicts

    context = inputs.context
    job = judge_job(inputs, open_judge(inputs), run_pairs(inputs))
    make = partial(make_verdicts, job, context)
    artifact, reused = found_or_made("judge", find_verdicts(job, context), make, context.log)
    return JudgedRun(artifact, reused, Against.of(read_verdicts(artifact.path)))


def would_judge(inputs: "Inputs") -> Intent:
    """Count the pairs, and the questions without an answer."""
    from pipeline.judges import judge_job, open_judge, run_pairs
    from stages.judge.stage import find_verdicts

    job = judge_job(inputs, open_judge(inputs), run_pairs(inputs))
    return Intent(
        "reuse" if find_verdicts(job, inputs.context) else "judge",
        {"judge": job.judge.name, "pairs": len(job.pairs), "questions": job.missing(inputs.context)},
    )


JUDGE = Command(
    "judge",
    judge,
    examples=(
        "align judge --set judge.function=rules:politeness",
        "align judge -c configs/dpo.yaml --set judge.endpoint=http://localhost:8000/v1",
    ),
    intent=would_judge,
)
