"""Shares and trainings as tasks of a Ray cluster, which places them and repeats those whose worker dies.

In: `--on ray[:ADDRESS]`, a configuration, a store that every machine of the cluster sees. Out: what the same commands return
without Ray, because a task is such a command in a process of its own: its files are whole or absent, so that it can be repeated.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from cache.errors import AlignError, MachineError, UsageError
from cache.locations import is_url
from cache.mirror import open_store
from pipeline import yaml_1_2
from pipeline.commands.command import Result
from pipeline.config import build_config
from pipeline.inputs import Inputs
from pipeline.sweep.runner import ROOT, Ended, Processes
from stages.runtime.context import Context, progress

RETRIES = 3
Work = Callable[..., Result]


class Cluster(Processes):
    """A connection to Ray that runs stages as tasks, each on a GPU of its own where the cluster has some."""

    def __init__(self, address: str | None, works: Mapping[str, Work]) -> None:
        """Connect to the cluster at `address`, or start one on this machine; raises `MachineError`.

        `works` has the function of each command that `run` is asked for.
        """
        super().__init__()
        self._works = works
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = self._ray = _import_ray()
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        try:
            ray.init(
                address=address,
                include_dashboard=False if address is None and "RAY_ADDRESS" not in os.environ else None,
                logging_level="error",
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise MachineError(f"No Ray cluster at {address}: {str(error).splitlines()[0]}") from error
        self._resources = ray.cluster_resources()

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole cluster."""
        return int(self._resources.get("GPU", 0))

    def num_tasks(self, on_gpus: bool) -> int:
        """How many tasks the cluster can run at once."""
        return max(1, self.num_gpus if on_gpus and self.num_gpus else int(self._resources.get("CPU", 1)))

    def run_shares(self, stage: str, work: Work, context: Context, on_gpus: bool) -> list[dict[str, Any]]:
        """Run `stage --shard i/N` for every i; what each prints with `--json`. Raises the first error of a share."""
        count = self.num_tasks(on_gpus)
        labels = [f"{number}/{count}" for number in range(1, count + 1)]
        config, store = context.config_text, context.store.address
        tasks = {self._submit(work, config, store, on_gpus, {"shard": label}): label for label in labels}
        found: dict[str, dict[str, Any]] = {}
        with progress(f"{stage} on ray", count, "shares") as advance:
            while tasks:
                [done], _ = self._ray.wait(list(tasks))
                label = tasks.pop(done)
                found[label] = self._result(done, f"share {label} of {stage}")
                advance(1, f"share {label}")
        return [found[label] for label in labels]

    def run(self, stage: str, config: Path, store: str, log: Path, device: int | None) -> Ended:
        """Run one stage of one configuration to its end."""
        task = self._submit(self._works[stage], config.read_text(encoding="utf-8"), store, True, {})
        try:
            return Ended(0, self._result(task, f"{stage} of {config.name}"), "", log)
        except AlignError as error:
            return Ended(error.exit_code, None, str(error), log)

    def stop(self) -> None:
        """Leave the cluster; its tasks of this process end."""
        self.stopping.set()
        self._ray.shutdown()

    def _submit(self, work: Work, config: str, store: str, on_gpus: bool, options: dict[str, Any]) -> Any:
        # max_calls: a process for each task, so that its memory is given back.
        task = self._ray.remote(
            num_cpus=1, num_gpus=1 if on_gpus and self.num_gpus else 0, max_retries=RETRIES, max_calls=1
        )(run_command)
        return task.remote(
            work, config, store if is_url(store) else str(Path(store).resolve()), os.getcwd(), options
        )

    def _result(self, task: Any, what: str) -> dict[str, Any]:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            if isinstance(error.cause, AlignError):
                raise error.cause from None
            raise
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            raise MachineError(
                f"The worker of {what} died {RETRIES + 1} times (out of memory, or killed). What other tasks made is kept: type the "
                f"same command again."
            ) from error


def run_command(work: Work, config: str, store: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """A task: one command in this process, with paths relative to `folder`; what it prints with `--json`."""
    os.chdir(folder)
    inputs = Inputs(build_config(yaml_1_2.load(config)), Context(open_store(store), config))
    return work(inputs, **options).as_json()


@contextmanager
def cluster(on: str, works: Mapping[str, Work] | None = None) -> Iterator[Cluster]:
    """The cluster that `--on` names, until the block is left; raises `UsageError` for anything but ray[:ADDRESS]."""
    name, _, address = on.partition(":")
    if name != "ray":
        raise UsageError(f"--on {on}: expected ray or ray:ADDRESS, for example --on ray:head:6379.")
    own = Cluster(address or None, works or {})
    try:
        yield own
    finally:
        own.stop()


def _import_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise MachineError("--on ray needs the package ray: pip install -e '.[ray]'.") from error
