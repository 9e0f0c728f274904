"""What a command is: the function that does it, what a dry run says of it, its options, its examples.

Modules of commands are imported to print `--help`, so what loads torch is imported inside their functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cache.artifacts import Artifact
from cache.errors import StaleError
from pipeline import tables

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config import RunConfig
    from pipeline.inputs import Inputs


class Result(Protocol):
    """What a command returns, for a program and for a person."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        ...

    def show(self, console: "Console") -> None:
        """Print it as tables."""
        ...


@dataclass(frozen=True)
class Intent:
    """What a stage would do, and the figures it would do it with."""

    would: str
    details: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"would": self.would, **self.details}


@dataclass(frozen=True)
class DryRun:
    """What each of the stages of a command would do."""

    stages: Mapping[str, Intent]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: intent.as_json() for name, intent in self.stages.items()}

    def show(self, console: "Console") -> None:
        """Print one line for each stage."""
        for name, intent in self.stages.items():
            details = [
                f"{key.replace('_', ' ')} {tables.plain(value)}" for key, value in intent.details.items()
            ]
            console.print(
                f"{name}: would {intent.would}" + (f" ({', '.join(details)})" if details else ""),
                markup=False,
            )


@dataclass(frozen=True)
class Command:
    """One command of `align`.

    `work` is called with the inputs and the command's own options, which are the rest of its parameters in
    typer's notation; its docstring is the help. `intent` is its dry run; it neither computes nor writes.
    `parts` are the commands that one of several consists of, for a configuration.
    """

    name: str
    work: Callable[..., Result]
    examples: Sequence[str]
    intent: "Callable[[Inputs], Intent] | None" = None
    parts: "Callable[[RunConfig], Sequence[Command]] | None" = None
    takes_loss: bool = True

    @property
    def has_dry_run(self) -> bool:
        """Whether it takes `--dry-run`."""
        return self.intent is not None or self.parts is not None

    def dry_run(self, inputs: "Inputs") -> DryRun:
        """What it would do, from what is in the store."""
        parts = [self] if self.parts is None else self.parts(inputs.config)
        return DryRun({part.name: part._intent(inputs) for part in parts})

    def _intent(self, inputs: "Inputs") -> Intent:
        assert self.intent is not None, f"{self.name} has no dry run"
        if inputs.needs_quickstart:
            return Intent("build the quickstart's model and data first", {})
        try:
            return self.intent(inputs)
        except StaleError as error:
            return Intent(f"run after its inputs are there: {error}", {})


@dataclass(frozen=True)
class StageResult:
    """The artifact of a stage, and whether it was there before."""

    artifact: Artifact
    reused: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`: with the counts of the artifact's manifest."""
        return {
            "artifact": str(self.artifact.path),
            "fingerprint": self.artifact.fingerprint,
            "reused": self.reused,
            **self.artifact.counts,
        }


def found_or_made(
    name: str, found: Artifact | None, make: Callable[[], Artifact], say: Callable[[str], None]
) -> tuple[Artifact, bool]:
    """The artifact of a stage and whether it was there before, which one line says."""
    if found is None:
        return make(), False
    say(f"{name}: already done, {found.path}")
    return found, True
