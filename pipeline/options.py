"""The options that commands share, and the configuration they select."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import UsageError
from pipeline import completion
from pipeline.commands.command import Command, flag

if TYPE_CHECKING:
    from pipeline.config_blocks import Blocks
    from pipeline.session import Session
    from stages.settings.data import DataSettings

DEFAULT_STORE = "artifacts"


@dataclass(frozen=True)
class SharedOptions:
    """In the order of `--help`. An option that a command does not take keeps its default."""

    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME",
            autocompletion=completion.losses,
            help="Replace the loss block by the defaults of this loss, e.g. dpo, kto, simpo.",
        ),
    ] = None
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "-c",
            "--config",
            metavar="FILE",
            autocompletion=completion.config_files,
            help="YAML configuration. Repeatable: later files win.",
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="BLOCK.KEY=VALUE",
            autocompletion=completion.assignments,
            help="Set one configuration key. Repeatable.",
        ),
    ] = None
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="DIR",
            envvar="ALIGN_STORE",
            help="Folder that artifacts are kept in, or a URL such as s3://bucket/store.",
        ),
    ] = DEFAULT_STORE
    assignments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BLOCK.KEY=VALUE]...",
            autocompletion=completion.assignments,
            help="The same as --set, as sweep programs write it.",
            show_default=False,
        ),
    ] = None
    offline: Annotated[bool, flag("--offline", "Reach no other machine, whatever is configured.")] = False
    json_: Annotated[bool, flag("--json", "Print the result as one JSON object.")] = False
    dry_run: Annotated[bool, flag("--dry-run", "Print what would be done; write nothing.")] = False
    quiet: Annotated[bool, flag("--quiet", "Print errors only, and with --json the result.")] = False
    debug: Annotated[bool, flag("--debug", "Show tracebacks of errors.")] = False

    def session(self, reads_data: bool) -> "Session":
        """The session of the selected configuration and store.

        Raises `UsageError` for an invalid configuration, and with `reads_data` `DataError` for data files that are missing:
        both before torch is imported, unless it is the loss that is invalid.
        """
        from pipeline.config_blocks import check_blocks

        self.go_offline()
        from pipeline.config_refusals import refuse_url_with_secret
        from pipeline.config_sources import merged

        refuse_url_with_secret(self.store, "--store")
        tree = merged(self.config or [], self._assigned, self.loss)
        blocks = check_blocks(tree)
        if self.offline:
            _refuse_what_needs_a_network(self.store, blocks)
        if reads_data:
            _check_files(blocks.data)

        from pipeline.config import build_config
        from pipeline.session import Session

        return Session(build_config(tree), self.store, self._arguments(), self.loss)

    def go_offline(self) -> None:
        """With `--offline`, reach no other machine from here on; before a library reads the environment."""
        if self.offline:
            from stages.runtime.offline import go_offline

            go_offline()

    @property
    def _assigned(self) -> list[str]:
        return [*(self.set_ or []), *(self.assignments or [])]

    def _arguments(self) -> str:
        parts: list[str] = []
        parts += [part for path in self.config or [] for part in ("-c", str(path))]
        parts += [part for assignment in self._assigned for part in ("--set", assignment)]
        parts += ["--offline"] if self.offline else []
        parts += ["--store", self.store] if self.store != DEFAULT_STORE else []
        return shlex.join(parts)


def _check_files(data: "DataSettings") -> None:
    from pipeline.config_sources import EMBEDDED
    from stages.data.mixing import sources_of
    from stages.data.readers import local_files

    for source in sources_of(data):
        if source.data.path != EMBEDDED:
            local_files(source.data)


def _refuse_what_needs_a_network(store: str, config: "Blocks") -> None:
    from cache.locations import is_url

    if is_url(store):
        raise UsageError(
            f"--offline: the store {store} is on another machine. Name a folder with --store DIR."
        )
    if config.track.wandb == "online":
        raise UsageError(
            "--offline: track.wandb is online. Use --set track.wandb=offline, and `wandb sync` later."
        )


def typer_function(
    command: Command, call: Callable[[Command, SharedOptions, dict[str, Any]], None]
) -> Callable[..., None]:
    """`call` with the signature that typer reads options from: the command's own, then the shared ones it takes."""
    left_out = {"loss"} if not command.takes_loss else set()
    left_out |= {"assignments"} if not command.takes_assignments else set()
    left_out |= {"dry_run"} if not command.has_dry_run else set()
    names = [field.name for field in fields(SharedOptions) if field.name not in left_out]
    if command.without_config is not None:
        names = [name for name in names if name in command.without_config]
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(SharedOptions)
        if field.name in names
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
