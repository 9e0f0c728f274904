"""The commands, carried out for one configuration over one store.

Stages meet only through artifacts. A missing input is an error that names the command to run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.artifacts import Store
from pipeline.commands import COMMANDS
from pipeline.commands.command import Result
from pipeline.config import RunConfig
from pipeline.inputs import Inputs
from stages.runtime.context import Context, say_on_stderr


class Session:
    """One configuration over one store."""

    def __init__(
        self,
        config: RunConfig,
        store: Path,
        arguments: str = "",
        loss: str | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """Nothing is loaded. `arguments` and `loss` select this configuration in commands that errors suggest."""
        self.config = config
        takes_loss = frozenset(name for name, command in COMMANDS.items() if command.takes_loss)
        self.context = Context(Store(store), config.to_yaml(), arguments, loss, takes_loss, say)
        self.inputs = Inputs(config, self.context)

    def run(self, name: str, **options: Any) -> Result:
        """Run a command with its own options, such as `shard` of cache-ref."""
        return COMMANDS[name].work(self.inputs, **options)

    def dry_run(self, name: str) -> Result:
        """What `run` would do, from what is in the store; writes nothing."""
        return COMMANDS[name].dry_run(self.inputs)
