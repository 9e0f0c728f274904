"""The options that every command takes, said once: how they read in `--help`, and what they select."""

import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.artifacts import DEFAULT_STORE

if TYPE_CHECKING:
    from pipeline.run import Session


@dataclass(frozen=True)
class Common:
    """The shared options, in the order of the help; one that a command leaves out keeps its default."""

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
    # Read from sys.argv by `main`, which also catches what goes wrong before options are known.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False

    def session(self, shard: str | None = None) -> "Session":
        """The configuration selected, over the store; raises `UsageError` where it is not a valid one."""
        from pipeline.config import load_config
        from pipeline.run import Session

        config = load_config(self.config or [], self.set_ or [], self.loss)
        return Session(config, self.store, self._arguments(), self.loss, shard=shard)

    def _arguments(self) -> str:
        """The arguments that select this configuration, for commands that errors suggest."""
        parts: list[str] = []
        parts += [part for path in self.config or [] for part in ("-c", str(path))]
        parts += [part for assignment in self.set_ or [] for part in ("--set", assignment)]
        parts += ["--store", str(self.store)] if self.store != DEFAULT_STORE else []
        return shlex.join(parts)


def with_common_options(body: Callable[..., None], without: Collection[str]) -> Callable[..., None]:
    """`body`, whose parameter `common` is a `Common`, as typer wants it: with one parameter for each option.

    In the help, what stands before `common` in the signature comes first, and what stands behind it
    follows `--set`.
    """
    shared = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Common)
        if field.name not in without
    ]
    names = [parameter.name for parameter in shared]
    own = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in signature(body).parameters.values()
    ]
    place = [parameter.name for parameter in own].index("common")
    selecting = names.index("set_") + 1

    def command(**values: Any) -> None:
        body(common=Common(**{name: values.pop(name) for name in names}), **values)

    command.__doc__ = body.__doc__
    parameters = [*own[:place], *shared[:selecting], *own[place + 1 :], *shared[selecting:]]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command
