"""Work in processes forked from the test's own: what a command or torchrun starts, without its imports.

A forked process computes with one thread, for the threads of the process it comes from are not there. What it
computes equals bit by bit what a test computes that has the fixture `one_thread`.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Work = Callable[[], object]


def in_child(work: Work, errors: Path | None = None) -> int:
    """The exit code of `work` in a child: negative for the signal that ended it.

    What it says on standard error is thrown away; what it raises is written to `errors`.
    """
    return exit_code(fork(work, errors))


def on_two_ranks(work: Work, errors: Path) -> list[int]:
    """The exit codes of `work` in two children with a gloo group of their own.

    They meet at a store of this process, as they would at torchrun's.
    """
    leave_group()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [fork(work, errors, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    return [exit_code(rank) for rank in ranks]


def leave_group() -> None:
    """Leave the group that an earlier test made where this process was its only rank; its children would be in it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fork(work: Work, errors: Path | None = None, environment: dict[str, str] | None = None) -> int:
    """The process id of a child that does `work` and ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as ended:
        code = int(str(ended.code))
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        if errors is not None:
            with errors.open("a", encoding="utf-8") as file:
                file.write(f"{traceback.format_exc()}\n")
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
