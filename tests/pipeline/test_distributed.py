"""Real gloo ranks: sharded and replicated runs are the one-rank run; a killed rank ends them all.

Equal ranks give equal bits, so a run that was killed and continued on as many ranks is compared bit by bit. Another
number of ranks adds up the same numbers in another order, and how far that drifts depends on the processor. It is
compared with what other orders do on this processor: the one-rank run with other micro-batches.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cache.files import sha256_file
from stages.train.checkpoints import FILES
from stages.train.loop import Run
from tests.forked import exit_code
from tests.pipeline.small_run import (
    command_line,
    errors_of,
    metrics_of,
    run,
    settings,
    torchrun,
    train_on_two_ranks,
)

pytestmark = pytest.mark.slow

# Sums over the tokens or examples of a step or of the held-out set: all that another order of adding may change.
SUMS = ("loss", "grad_norm", "kl", "logps/chosen", "logps/rejected", "rewards/margins")
SUMMED = {*SUMS, *(f"eval/{name}" for name in SUMS)}
# The largest difference between splits is one sample of what rounding does; another split exceeds ten times the
# largest of some fifty only if it does something else.
SPREADS = 10
SPLITS = (40, 200, 2000)


def tree_of(model: Path, preferences: Path, adapter: dict | None = None, **train: Any) -> dict:
    return settings(
        model,
        preferences,
        compute={"tokens_per_batch": 100},
        # kto scores rows before the step, so ranks meet outside the backward pass too.
        loss={"name": "kto"},
        adapter=adapter or {},
        train={"batch_size": 5, "eval_steps": 3, "save_steps": 3, "learning_rate": 1e-4, **train},
    )


def prepared(tree: dict, store: Path) -> Path:
    """A store with rows and reference log-probs."""
    run(tree, store, "prepare", "cache-ref")
    return store


def copy_of(store: Path, name: str) -> Path:
    return shutil.copytree(store, store.parent / name)


def trajectory(result: dict) -> list[dict]:
    return metrics_of(result["artifact"])


def spread_over_splits(tree: dict, store: Path, whole: list[dict]) -> dict[str, float]:
    """How far each metric of a run moves, at most, where only the micro-batches differ."""
    spread = dict.fromkeys(SUMMED, 0.0)
    for tokens in SPLITS:
        other = {**tree, "compute": {**tree["compute"], "tokens_per_batch": tokens}}
        split = trajectory(run(other, copy_of(store, f"split-{tokens}"), "train"))
        for name, difference in differences(split, whole):
            spread[name] = max(spread[name], difference)
    return spread


def differences(found: list[dict], expected: list[dict]) -> Iterator[tuple[str, float]]:
    for ours, theirs in zip(found, expected, strict=True):
        for name in SUMMED & theirs.keys():
            yield name, abs(ours[name] - theirs[name])


def outside(found: list[dict], expected: list[dict], spread: dict[str, float]) -> set[str]:
    """The metrics that differ by more than rounding does."""
    return {name for name, difference in differences(found, expected) if difference > SPREADS * spread[name]}


def assert_same_schedule(found: list[dict], expected: list[dict]) -> None:
    """Steps, learning rates and what is logged: nothing of this is rounded."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"step", "epoch", "learning_rate"} & theirs.keys():
            assert ours[name] == theirs[name], (theirs["step"], name)


def assert_same_layout(found: Path, expected: Path) -> None:
    """The same files, and weights of the same names and shapes in float32."""
    layouts = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not is_of_optimizer(path))
        for folder in (found, expected)
    ]
    assert layouts[0] == layouts[1]
    ours, theirs = (load_file(next(folder.glob("*model.safetensors"))) for folder in (found, expected))
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }
    assert all(value.dtype == torch.float32 for value in ours.values())


def is_of_optimizer(path: Path) -> bool:
    """Files of a checkpoint that differ between one whole optimizer and its shards."""
    return path.name in ("optimizer.pt", "shards") or path.parent.name == "shards"


def assert_same_run(found: dict, expected: dict, spread: dict[str, float]) -> None:
    """The same run on another number of ranks."""
    ours, theirs = trajectory(found), trajectory(expected)
    assert_same_schedule(ours, theirs)
    assert not outside(ours, theirs, spread)
    assert_same_layout(Path(found["artifact"]), Path(expected["artifact"]))


def assert_same_bits(found: dict, expected: dict) -> None:
    """The same run on the same number of ranks: every file but those that hold times and paths."""
    assert trajectory(found) == trajectory(expected)
    folders = [Path(result["artifact"]) for result in (found, expected)]
    ours, theirs = (
        {
            str(path.relative_to(folder)): sha256_file(path)
            for path in folder.rglob("*")
            if path.is_file() and path.name not in ("manifest.json", "metrics.jsonl", ".checked.json", FILES)
        }
        for folder in folders
    )
    assert ours == theirs


@contextmanager
def examples_taken() -> Iterator[dict[int, list[int]]]:
    """The examples of each step that this process takes, by step."""
    taken: dict[int, list[int]] = {}
    examples_of = Run.examples_of

    def noted(self: Run, step: int) -> Any:
        examples = examples_of(self, step)
        taken[step] = examples.tolist()
        return examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "examples_of", noted)
        yield taken


def test_two_sharded_ranks_train_like_one_process(tiny_model, preferences, tmp_path):
    """Ranks have unequal numbers of packs in most steps: a step is five examples.

    They sample the same completions in step, before and while they train, and what they leave
    behind opens as a model, which generates as the model before it.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 9]}
    (model / "generation_config.json").write_text(json.dumps(generation))
    tree = tree_of(model, preferences, sample_steps=4, sample_prompts=3, keep_last=1, learning_rate=1e-3)
    tree["sample"] = {"max_tokens": 6}
    store = prepared(tree, tmp_path / "store")
    expected = run(tree, copy_of(store, "one"), "train")
    spread = spread_over_splits(tree, store, trajectory(expected))
    tree["train"]["parallel"] = "fsdp"
    assert train_on_two_ranks(tree, store) == [0, 0], errors_of(store).read_text()
    found = run(tree, store, "train")
    assert found["audit_max_abs_diff"] == 0.0
    assert_same_run(found, expected, spread)
    ours, theirs = (Path(result["artifact"]) for result in (found, expected))
    assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
    assert json.loads((ours / "generation_config.json").read_text()) == generation
    (checkpoint,) = ours.glob("checkpoint-*")
    assert [path.name for path in sorted((checkpoint / "shards").iterdir())] == [
        "00000.safetensors",
        "00001.safetensors",
    ]
    opened = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    published = load_file(ours / "model.safetensors")
    assert all(torch.equal(opened[name], value) for name, value in published.items())


@pytest.mark.parametrize(
    ("parallel", "adapter"), [("ddp", {}), ("fsdp", {"name": "lora", "r": 4})], ids=["ddp", "fsdp"]
)
def test_a_killed_rank_ends_all_and_one_rank_continues(parallel, adapter, tiny_model, preferences, tmp_path):
    """Two ranks train as one does and continue to the same bits; one continues to the same run.

    What is sharded is an adapter, whose shards are few: the checkpoint holds them and their optimizer alone.
    """
    kept = {"keep_together": "conversation"} if parallel == "ddp" else {}
    tree = tree_of(tiny_model, preferences, adapter, parallel=parallel, keep_last=1, **kept)
    store = prepared(tree, tmp_path / "store")
    two = copy_of(store, "two")
    assert train_on_two_ranks(tree, two) == [0, 0], errors_of(two).read_text()
    killed = copy_of(store, "killed")
    ended, by_signal = train_on_two_ranks(tree, killed, killed_at=4)
    assert by_signal == -signal.SIGKILL
    assert ended > 0
    assert not list((killed / "policy").glob("[!.]*"))
    continued_by_one = copy_of(killed, "continued-by-one")

    assert train_on_two_ranks(tree, killed) == [0, 0], errors_of(killed).read_text()
    assert_same_bits(run(tree, killed, "train"), run(tree, two, "train"))

    whole = tree_of(tiny_model, preferences, adapter, keep_last=1, **kept)
    with examples_taken() as order:
        expected = run(whole, copy_of(store, "one"), "train")
    spread = spread_over_splits(whole, store, trajectory(expected))
    assert_same_run(run(tree, two, "train"), expected, spread)
    forgetful = copy_of(continued_by_one, "forgetful")
    said: list[str] = []
    with examples_taken() as taken:
        resumed = run(tree, continued_by_one, "train", said=said)
    assert any("Continuing from step 3" in line for line in said), said
    assert taken == {step: order[step] for step in range(4, 9)}
    assert_same_run(resumed, expected, spread)
    if parallel == "ddp":
        forget_moments(next((forgetful / "policy").glob(".tmp-*/checkpoint-3")))
        forgot = trajectory(run(tree, forgetful, "train"))
        assert {"loss", "grad_norm", "eval/loss"} <= outside(forgot, trajectory(expected), spread)


def forget_moments(checkpoint: Path) -> None:
    """Set Adam's moments in a checkpoint to 0: what a resume that loses them would continue with."""
    path = checkpoint / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
    torch.save(state, path)
    listed = json.loads((checkpoint / FILES).read_text())
    (checkpoint / FILES).write_text(json.dumps({**listed, path.name: sha256_file(path)}))


def test_under_torchrun_a_killed_rank_ends_all_and_the_same_command_continues(
    tiny_model, preferences, tmp_path
):
    """The real launcher and its exit codes, and a signal at whatever point of the run.

    Not by `--max-restarts`: the new ranks of torch 2.13 sometimes wait for each other while they make their gloo group.
    """
    tree = tree_of(tiny_model, preferences, save_steps=1)
    store = prepared(tree, tmp_path / "store")
    command = command_line(tree, store, "train")
    launcher = torchrun(command, tmp_path / "killed")
    while not list((store / "policy").glob(".tmp-*/checkpoint-2")):
        assert os.waitpid(launcher, os.WNOHANG) == (0, 0), said_by_ranks(tmp_path / "killed")
        time.sleep(0.01)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert exit_code(launcher) == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not list((store / "policy").glob("[!.]*"))

    assert exit_code(torchrun(command, tmp_path / "again")) == 0, said_by_ranks(tmp_path / "again")
    said = said_by_ranks(tmp_path / "again")
    assert "Continuing from step" in said["0/stderr.log"]
    assert json.loads(said["0/stdout.log"])["steps"] == 8
    assert said["1/stdout.log"] == ""  # the first rank alone speaks


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the launcher's forked children, in order of rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    forked = Path(f"/proc/{launcher}/cmdline").read_bytes()
    return [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == forked]


def said_by_ranks(logs: Path) -> dict[str, str]:
    """What torchrun wrote down of each rank, by `RANK/stdout.log` and `RANK/stderr.log`."""
    return {"/".join(path.parts[-2:]): path.read_text() for path in logs.glob("*/attempt_0/*/std*.log")}
