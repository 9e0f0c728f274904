"""The options that commands share: how they read in `--help`, and the configuration they select."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.artifacts import DEFAULT_STORE
from pipeline.commands.command import Command

if TYPE_CHECKING:
    from pipeline.session import Session


@dataclass(frozen=True)
class SharedOptions:
    """In the order of the help; an option that a command does not take keeps its default."""

    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME",
            help="Train with this loss and its own defaults, e.g. dpo, kto, simpo; a wrong name lists them all.",
        ),
    ] = None
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "-c", "--config", metavar="FILE", help="YAML configuration; repeatable, later files win."
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="BLOCK.KEY=VALUE", help="Change one configuration key; repeatable."),
    ] = None
    store: Annotated[
        Path, typer.Option("--store", metavar="DIR", envvar="ALIGN_STORE", help="Folder of artifacts.")
    ] = DEFAULT_STORE
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and everything else on stderr.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False

    def session(self) -> "Session":
        """The configuration selected, over the store; raises `UsageError` where it is not a valid one."""
        from pipeline.config import load_config
        from pipeline.session import Session

        config = load_config(self.config or [], self.set_ or [], self.loss)
        return Session(config, self.store, self._arguments(), self.loss)

    def _arguments(self) -> str:
        parts: list[str] = []
        parts += [part for path in self.config or [] for part in ("-c", str(path))]
        parts += [part for assignment in self.set_ or [] for part in ("--set", assignment)]
        parts += ["--store", str(self.store)] if self.store != DEFAULT_STORE else []
        return shlex.join(parts)


def typer_function(
    command: Command, call: Callable[[Command, SharedOptions, dict[str, Any]], None]
) -> Callable[..., None]:
    """`call` with a signature that typer reads: the command's own options, then the shared ones it takes."""
    left_out = {"loss"} if not command.takes_loss else set()
    left_out |= {"dry_run"} if not command.has_dry_run else set()
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(SharedOptions)
        if field.name not in left_out
    ]
    own = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for parameter in list(signature(command.work).parameters.values())[1:]
    ]

    def function(**values: Any) -> None:
        options = SharedOptions(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        call(command, options, values)

    function.__doc__ = command.work.__doc__
    function.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    return function
