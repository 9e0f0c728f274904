"""Runs commands by name for one configuration and one store.

Stages exchange only artifacts. A missing input is an error that names the command to run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.mirror import open_store
from pipeline.catalogue.names import with_folders
from pipeline.commands import COMMANDS
from pipeline.commands.command import Result
from pipeline.config import RunConfig
from pipeline.inputs import Inputs
from stages.runtime.context import Context, log_to_stderr


class Session:
    """One configuration and one store."""

    def __init__(
        self,
        config: RunConfig,
        store: Path | str,
        arguments: str = "",
        loss: str | None = None,
        log: Callable[[str], None] = log_to_stderr,
    ) -> None:
        """Load nothing. `arguments` and `loss` are the command line's, for the commands that errors suggest.

        Names of artifacts in the configuration become folders of `store`.
        """
        opened = open_store(str(store))
        self.config = with_folders(config, opened.root)
        takes_loss = frozenset(name for name, command in COMMANDS.items() if command.takes_loss)
        self.context = Context(opened, self.config.to_yaml(), arguments, loss, takes_loss, log)
        self.inputs = Inputs(self.config, self.context)

    def run(self, name: str, **options: Any) -> Result:
        """Run a command; `options` are its own, such as `shard` for cache-ref."""
        return COMMANDS[name].work(self.inputs, **options)

    def dry_run(self, name: str, **options: Any) -> Result:
        """Report what `run` would do; writes nothing."""
        return COMMANDS[name].dry_run(self.inputs, **options)
