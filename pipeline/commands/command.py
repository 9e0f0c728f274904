"""The record of a command: the function that runs it, its dry run, its options, its examples.

`align --help` imports every command, so a command imports what loads torch inside its functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from cache.errors import StaleError

if TYPE_CHECKING:
    from rich.console import Console

    from cache.artifacts import Artifact
    from pipeline.config import RunConfig
    from pipeline.inputs import Inputs


class Result(Protocol):
    """What a command returns."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        ...

    def show(self, console: "Console") -> None:
        """Print the result as tables."""
        ...


class Given(Protocol):
    """What a command that reads no configuration is told: the shared options."""

    @property
    def store(self) -> str:
        """The folder or URL of the store."""
        ...


@dataclass(frozen=True)
class Intent:
    """What a stage would do: a verb, and details such as the number of steps."""

    would: str
    details: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"would": self.would, **self.details}


@dataclass(frozen=True)
class DryRun:
    """What a command would do, stage by stage."""

    stages: Mapping[str, Intent]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: intent.as_json() for name, intent in self.stages.items()}

    def show(self, console: "Console") -> None:
        """Print one line for each stage."""
        for name, intent in self.stages.items():
            details = ", ".join(f"{key}={_plain(value)}" for key, value in intent.details.items())
            console.print(
                f"{name}: would {intent.would}" + (f" ({details})" if details else ""), markup=False
            )


def _plain(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Command:
    """One command of `align`.

    `work` takes the inputs and then the command's own options, annotated for typer; its docstring is the help.
    `intent` is the dry run; it takes the same arguments, and neither computes nor writes. A command that runs
    others has `parts` instead: the commands that it runs under a configuration. `reads_data`: whether it reads the files of the
    block data, which are looked for before anything is imported. With `takes_assignments` it reads
    `BLOCK.KEY=VALUE` without `--set` too. A command that reads no configuration names in `without_config` the shared options that it
    takes; its `work` gets these instead of the inputs.
    """

    name: str
    work: Callable[..., Result]
    examples: Sequence[str]
    intent: Callable[..., Intent] | None = None
    parts: "Callable[[RunConfig], Sequence[Command]] | None" = None
    takes_loss: bool = True
    reads_data: bool = False
    takes_assignments: bool = False
    without_config: tuple[str, ...] | None = None

    @property
    def has_dry_run(self) -> bool:
        """Whether it takes `--dry-run`."""
        return self.intent is not None or self.parts is not None

    def dry_run(self, inputs: "Inputs", **options: Any) -> DryRun:
        """Compare the configuration with the store."""
        parts = [self] if self.parts is None else self.parts(inputs.config)
        return DryRun({part.name: part._intent(inputs, options) for part in parts})

    def _intent(self, inputs: "Inputs", options: Mapping[str, Any]) -> Intent:
        assert self.intent is not None, f"{self.name} has no dry run"
        if inputs.needs_quickstart:
            return Intent("first build the quickstart's model and data", {})
        try:
            return self.intent(inputs, **options)
        except StaleError as error:
            return Intent(f"wait for its input: {error}", {})


@dataclass(frozen=True)
class StageResult:
    """The artifact of a stage; `reused` if an earlier run made it."""

    artifact: "Artifact"
    reused: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, with the counts of the artifact's manifest."""
        return {
            "artifact": str(self.artifact.path),
            "fingerprint": self.artifact.fingerprint,
            "reused": self.reused,
            **self.artifact.counts,
        }


# The option of the stages that independent jobs can share.
Shard = Annotated[
    str | None,
    typer.Option("--shard", metavar="i/N", help="Do share i of N, for N independent jobs; i starts at 1."),
]

# The option of the commands whose work is tasks of a cluster.
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ray[:ADDRESS]",
        help="Do the work as tasks of a Ray cluster: the one at ADDRESS, or one started on this machine.",
    ),
]


def flag(name: str, help: str) -> Any:
    """A switch as a typer option; without the metavar, typer's help shows it as `{name} <bool>`."""
    return typer.Option(name, metavar="", help=help)


def found_or_made(
    name: str, found: "Artifact | None", make: "Callable[[], Artifact]", log: Callable[[str], None]
) -> "tuple[Artifact, bool]":
    """The artifact of a stage, made unless it was `found`; whether it was."""
    if found is None:
        return make(), False
    log(f"{name}: already done, {found.path}")
    return found, True
