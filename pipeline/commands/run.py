"""`align run`: runs the four stages in order, and the judge if the configuration names one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.commands.cache_ref import CACHE_REF
from pipeline.commands.command import Command, Result
from pipeline.commands.judge import JUDGE
from pipeline.commands.prepare import PREPARE
from pipeline.commands.sample import SAMPLE
from pipeline.commands.train import TRAIN

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.inputs import Inputs

STAGES = (PREPARE, CACHE_REF, TRAIN, SAMPLE, JUDGE)


@dataclass(frozen=True)
class RunResult:
    """The results by stage; `shown` if each was printed as it ended."""

    stages: Mapping[str, Result]
    shown: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: result.as_json() for name, result in self.stages.items()}

    def show(self, console: Console) -> None:
        """Print one result after the other, unless they were printed already."""
        for result in self.stages.values() if not self.shown else ():
            result.show(console)


def needed_stages(config: "RunConfig") -> list[Command]:
    """The stages that a configuration needs: cache-ref for a loss with a reference, judge where there is one and two models."""
    unneeded = set[str]()
    if not config.loss.needs_reference:
        unneeded.add(CACHE_REF.name)
    if not (config.sample.compare and config.judge.is_named):
        unneeded.add(JUDGE.name)
    return [stage for stage in STAGES if stage.name not in unneeded]


def run(inputs: "Inputs") -> RunResult:
    """Run stages 1 to 4 in order, and the judge if the block judge names one; results that exist are reused."""
    needed = needed_stages(inputs.config)
    results = {}
    for stage in STAGES:
        if stage in needed:
            results[stage.name] = stage.work(inputs)
            if inputs.show is not None:
                inputs.show(results[stage.name])
        elif stage is CACHE_REF:
            inputs.context.log(f"{stage.name}: not needed, loss {inputs.loss_name} uses no reference")
    return RunResult(results, inputs.show is not None)


RUN = Command(
    "run",
    run,
    examples=("align run", "align run -c configs/dpo.yaml"),
    parts=needed_stages,
    reads_data=True,
)
