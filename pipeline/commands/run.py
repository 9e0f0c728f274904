"""`align run`: the four stages in order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.commands.cache_ref import CACHE_REF
from pipeline.commands.command import Command, Result
from pipeline.commands.prepare import PREPARE
from pipeline.commands.sample import SAMPLE
from pipeline.commands.train import TRAIN

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.inputs import Inputs

STAGES = (PREPARE, CACHE_REF, TRAIN, SAMPLE)


@dataclass(frozen=True)
class RunResult:
    """The result of each stage by its name."""

    stages: Mapping[str, Result]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: result.as_json() for name, result in self.stages.items()}

    def show(self, console: Console) -> None:
        """One after the other."""
        for result in self.stages.values():
            result.show(console)


def needed_stages(config: "RunConfig") -> list[Command]:
    """The stages of a run: cache-ref only for a loss that has a reference."""
    return [stage for stage in STAGES if stage is not CACHE_REF or config.loss.needs_reference]


def run(inputs: "Inputs") -> RunResult:
    """All four stages in order; what is already there is not done again."""
    needed = needed_stages(inputs.config)
    results = {}
    for stage in STAGES:
        if stage in needed:
            results[stage.name] = stage.work(inputs)
        else:
            inputs.context.say(f"{stage.name}: not needed, {inputs.loss_name} has no reference")
    return RunResult(results)


RUN = Command("run", run, examples=("align run", "align run -c configs/dpo.yaml"), parts=needed_stages)
