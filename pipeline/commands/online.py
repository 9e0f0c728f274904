"""`align online`: rounds of sampling, judging and training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline import tables
from pipeline.commands.command import Command, Intent

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.inputs import Inputs
    from pipeline.online.rounds import Evaluated, Round


@dataclass(frozen=True)
class OnlineResult:
    """The rounds, the policy of the last one, and its figures on the held-out prompts."""

    rounds: "Sequence[Round]"
    policy: "Path"
    last: "Evaluated | None"
    judge: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        rounds = [{**asdict(one), "trained": str(one.trained)} for one in self.rounds]
        last = None if self.last is None else asdict(self.last)
        return {"artifact": str(self.policy), "judge": self.judge, "rounds": rounds, "last": last}

    def show(self, console: Console) -> None:
        """Print a line for each policy, measured on the held-out prompts."""
        evaluated = [one.policy for one in self.rounds] + [self.last]
        rows = sum(one.reference_rows for one in self.rounds)
        rows += sum(found.reference_rows for found in evaluated if found)
        what = f"{len(self.rounds)} rounds judged by {self.judge}, {rows:,} rows scored by the reference"
        tables.headline(console, "online", what, self.policy, False)
        table = tables.columns(
            "after round",
            "score",
            "wins over round 0",
            "tokens",
            "unfinished",
            "kl",
            "pairs of the next",
        )
        for one in self.rounds:
            table.add_row(str(one.number - 1), *_figures(one.policy), f"{one.pairs} of {one.prompts}")
        table.add_row(str(len(self.rounds)), *_figures(self.last), "")
        console.print(table)
        without: dict[str, int] = {}
        for reason, count in (item for one in self.rounds for item in one.without_pair.items()):
            without[reason] = without.get(reason, 0) + count
        if without:
            console.print(f"  prompts without a pair: {tables.counted(without)}")


def _figures(found: "Evaluated | None") -> tuple[str, ...]:
    if found is None:
        return "", "", "", "", ""
    rate, low, high = found.wins
    wins = "" if low == high else f"{rate:.0%} ({low:.0%} to {high:.0%})"
    reward = "" if found.reward is None else f"{found.reward:.3f}"
    kl = "" if found.kl is None else f"{found.kl:.2f}"
    return reward, wins, f"{found.tokens:.1f}", f"{found.unfinished:.0%}", kl


def online(inputs: "Inputs") -> OnlineResult:
    """Train on completions of the policy itself: sample, judge, prepare, cache-ref, train, round after round.

    Continues where it was interrupted. Any judge of `align judge` and any loss of pairs.
    """
    from pipeline.commands.prepare import PREPARE
    from pipeline.online.rounds import OnlineRun

    PREPARE.work(inputs)
    run = OnlineRun(inputs)
    policy, first, done = run.start, None, []
    for number in range(1, run.settings.rounds + 1):
        one, policy, heldout = run.round(number, policy, first)
        first = first or heldout
        done.append(one)
        inputs.context.log(
            f"online: round {number} of {run.settings.rounds}: {one.pairs} pairs of {one.prompts} prompts, "
            f"{'' if one.reward is None else f'mean score {one.reward:.3f}, '}{one.seconds:.0f} s"
        )
    return OnlineResult(done, policy.source.folder, run.last(policy, first), run.judge.name)


def would_online(inputs: "Inputs") -> Intent:
    """Count rounds and prompts."""
    from pipeline.online.rounds import OnlineRun

    run = OnlineRun(inputs)
    settings = run.settings
    return Intent(
        "sample, judge and train",
        {
            "rounds": settings.rounds,
            "prompts_per_round": settings.prompts_per_round,
            "different_prompts": len({tuple(prompt.ids) for prompt in run.prompts}),
            "completions_per_round": settings.prompts_per_round * settings.num_samples,
            "judge": run.judge.name,
            "loss": inputs.loss_name,
        },
    )


ONLINE = Command(
    "online",
    online,
    examples=(
        "align online -c configs/online-quickstart.yaml",
        "align online -c configs/ultrafeedback.yaml --set judge.reward_model=FOLDER --set online.rounds=20",
    ),
    intent=would_online,
    reads_data=True,
)
