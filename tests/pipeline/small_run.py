"""A run of seconds over the tiny model: its configuration, and its stages in this process or on two ranks."""

import json
import os
import signal
import time
from pathlib import Path

import torch.distributed.run
import yaml

from pipeline.config import build_config
from pipeline.session import Session
from stages.train.loop import Run
from tests.forked import fork, leave_group, on_two_ranks

ROOT = Path(__file__).resolve().parents[2]
LN2 = 0.6931471805599453


def settings(model: Path, data: Path, **changes: dict) -> dict:
    """A configuration; `changes` are blocks to merge in."""
    tree = {
        "data": {"path": str(data)},
        "policy": {"model": str(model)},
        "prepare": {"max_length": 128, "heldout_fraction": 0.25},
        "compute": {"dtype": "float32", "device": "cpu", "tokens_per_batch": 300},
        # A card takes longer than such a training.
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 4,
            "num_epochs": 2,
            "eval_steps": 2,
            "model_card": False,
        },
    }
    for block, values in changes.items():
        tree[block] = {**tree.get(block, {}), **values}
    return tree


class JsonSession(Session):
    """A session whose commands return what they print with `--json`."""

    def run(self, name: str, **options) -> dict:
        return super().run(name, **options).as_json()


def session(tree: dict, store: Path, said: list[str] | None = None) -> JsonSession:
    """What it says goes to `said`."""
    return JsonSession(build_config(tree), store, log=(said if said is not None else []).append)


def run(tree: dict, store: Path, *stages: str, said: list[str] | None = None) -> dict:
    """The result of the last of these stages, each as a command of its own."""
    return [session(tree, store, said).run(stage) for stage in stages][-1]


def through_training(tree: dict, store: Path) -> dict:
    """Run the first three stages and return train's result."""
    first = ("prepare", "cache-ref") if build_config(tree).loss.needs_reference else ("prepare",)
    return run(tree, store, *first, "train")


def train_on_two_ranks(tree: dict, store: Path, killed_at: int | None = None) -> list[int]:
    """Train on two forked ranks; their exit codes.

    Rank 1 is killed as it begins step `killed_at`, when the checkpoint of the step before is whole.
    """

    def work() -> None:
        if killed_at is not None:
            _kill_rank_1(killed_at)
        run(tree, store, "train")

    return on_two_ranks(work, errors_of(store))


def errors_of(store: Path) -> Path:
    """What the ranks that train in `store` raised."""
    return store.parent / f"{store.name}-errors.txt"


def _kill_rank_1(step: int) -> None:
    take = Run._step

    def killed(self: Run, number: int) -> dict:
        if number == step and self.world.rank == 1:
            while not (self.folder / f"checkpoint-{step - 1}").is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, number)

    Run._step = killed  # type: ignore[method-assign]


def command_line(tree: dict, store: Path, stage: str) -> list[str]:
    """The arguments of `align` for a stage."""
    config = store.parent / f"{store.name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    return [stage, "-c", str(config), "--store", str(store), "--json"]


def torchrun(arguments: list[str], logs: Path) -> int:
    """The process id of torchrun with a command line of `align` on two ranks; what they say goes to files in `logs`.

    Its ranks are forked, so that no interpreter starts and imports everything: torchrun's own options ask for that.
    """
    options = ["--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(logs)]
    forked = ["--start-method", "fork", "--run-path", str(ROOT / "pipeline" / "__main__.py")]
    leave_group()
    return fork(lambda: torch.distributed.run.main([*options, *forked, *arguments]))


def metrics_of(policy: str | Path) -> list[dict]:
    """The lines logged, without times, which no two runs share."""
    lines = [json.loads(line) for line in (Path(policy) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "step_seconds"} for line in lines]
