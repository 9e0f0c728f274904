"""Gloo ranks forked from this process: what torchrun starts, without its imports; one may be killed at a step."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from stages.train.loop import Run
from tests.pipeline.small_run import run


def train_on_two_ranks(tree: dict, store: Path, killed_at: int | None = None) -> list[int]:
    """The train stage on two ranks; their exit codes, the negated signal for one that was killed.

    Rank 1 is killed as it begins step `killed_at`, when the checkpoint of the step before is whole.
    """

    def work() -> None:
        if killed_at is not None:
            kill_rank_1(killed_at)
        run(tree, store, "train")

    return on_two_ranks(work, errors=store.parent / f"{store.name}-errors.txt")


def kill_rank_1(step: int) -> None:
    """In a rank: have rank 1 killed as it begins `step`, when every rank has left the one before behind."""
    take = Run._step

    def killed(self: Run, number: int) -> dict:
        if number == step and self.world.rank == 1:
            while not (self.folder / f"checkpoint-{step - 1}").is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, number)

    Run._step = killed  # type: ignore[method-assign]


def on_two_ranks(work: Callable[[], object], errors: Path) -> list[int]:
    """Run `work` in two forked processes with a gloo group of their own; their exit codes.

    What they raise is written to `errors`. The processes meet at a store of this one, as they would at torchrun's.
    """
    if dist.is_initialized():  # by an earlier test that was its own only rank
        dist.destroy_process_group()
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            _be_rank(rank, meeting.port, work, errors)
        ranks.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]


def _be_rank(rank: int, port: int, work: Callable[[], object], errors: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        with errors.open("a", encoding="utf-8") as file:
            file.write(f"rank {rank}: {traceback.format_exc()}\n")
    finally:
        os._exit(status)
