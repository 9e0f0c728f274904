"""Runs the trainings of a sweep as processes of their own, so that one that is killed takes no other with it.

In: members, a store, devices. Out: how each ended. A member's configuration and what its process said are kept in the
folder of the sweep.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache.errors import BusyError
from cache.files import write_bytes
from pipeline.sweep.members import Member

ROOT = Path(__file__).resolve().parents[2]
# A process that is told to stop writes a checkpoint first.
PATIENCE_SECONDS = 120.0
BUSY_PAUSE_SECONDS = 2.0
# The launcher's variables, which would make a member one rank of many.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How the process of a stage ended: its exit code (negative for a signal), its result, its last line, its log."""

    code: int
    result: dict[str, Any] | None
    last_line: str
    log: Path

    @property
    def problem(self) -> str | None:
        """One line for a process that failed."""
        if self.code == 0:
            return None
        if self.code < 0:
            name = signal.Signals(-self.code).name
            why = " (out of memory, or by hand)" if name == "SIGKILL" else ""
            return f"killed by {name}{why}; log: {self.log}"
        return self.last_line.removeprefix("align: ") or f"ended with code {self.code}; log: {self.log}"


@dataclass
class Processes:
    """Processes that end with this one: `stop` ends them all and lets no further one start."""

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End every process; those that train write a checkpoint first."""
        self.stopping.set()
        alive = [process for process in list(self.running) if process.poll() is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in alive:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, stage: str, config: Path, store: str, log: Path, device: int | None) -> Ended:
        """Run one stage of one configuration to its end."""
        command = [
            sys.executable,
            "-m",
            "pipeline",
            stage,
            "-c",
            str(config),
            "--store",
            str(store),
            "--json",
        ]
        with open(log, "ab") as errors:
            start = errors.tell()
            process = subprocess.Popen(
                command, env=_environment(device), stdout=subprocess.PIPE, stderr=errors
            )
            self.running.add(process)
            if self.stopping.is_set():
                process.terminate()
            out, _ = process.communicate()
            self.running.discard(process)
        lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        result = json.loads(out) if process.returncode == 0 else None
        return Ended(process.returncode, result, lines[-1] if lines else "", log)


def until_free(attempt: Callable[[], Ended], pause: float = BUSY_PAUSE_SECONDS) -> Ended:
    """How a stage ended that was tried until no other process wrote what it needs.

    Members of a sweep that run at the same time need the same completions of the reference: one samples them, the others wait.
    """
    while (ended := attempt()).code == BusyError.exit_code:
        time.sleep(pause)
    return ended


@contextmanager
def processes() -> Iterator[Processes]:
    """Processes that are ended when the block is left, by an interrupt too."""
    own = Processes()
    try:
        yield own
    finally:
        own.stop()


def _environment(device: int | None) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    inherited = os.environ.get("PYTHONPATH")
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), inherited] if inherited else [str(ROOT)])
    return own if device is None else {**own, "CUDA_VISIBLE_DEVICES": str(device)}


def config_file(folder: Path, member: Member) -> Path:
    """The configuration of a member as a file, which `align train -c` reads."""
    path = folder / f"{member.number:03}.yaml"
    text = f"# Member {member.number} of a sweep: {member.name}\n{member.config.to_yaml()}"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_bytes(path, text.encode())
    return path


def each_on_a_device(
    members: Sequence[Member],
    devices: Sequence[int],
    work: Callable[[Member, int | None], None],
    own: Processes,
) -> None:
    """Call `work(member, device)` for every member, one at a time on each device; without devices one after another."""
    free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for device in devices or [None]:
        free.put(device)

    def on_free_device(member: Member) -> None:
        if own.stopping.is_set():
            return
        device = free.get()
        try:
            work(member, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(max(1, len(devices))) as pool:
        futures = [pool.submit(on_free_device, member) for member in members]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            own.stop()
            raise
