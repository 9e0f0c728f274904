"""Real gloo ranks under torchrun: sharded and replicated runs are the one-rank run; a killed rank ends them all."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline.small_run import finish, metrics_of, on_two_ranks, run, settings

pytestmark = pytest.mark.slow


def tree_of(model: Path, preferences: Path, adapter: dict | None = None, **train: Any) -> dict:
    return settings(
        model,
        preferences,
        compute={"tokens_per_batch": 100},
        # kto scores rows before the step, so ranks meet outside the backward pass too.
        loss={"name": "kto"},
        adapter=adapter or {},
        train={"batch_size": 5, "eval_steps": 3, "save_steps": 1, **train},
    )


def assert_same_run(found: dict, expected: dict) -> None:
    ours, theirs = metrics_of(found["artifact"]), metrics_of(expected["artifact"])
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, wanted in zip(ours, theirs, strict=True):
        assert line.keys() == wanted.keys()
        for name in {"loss", "grad_norm", "eval/loss", "logps/chosen", "kl"} & wanted.keys():
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), (line["step"], name)
    folders = [Path(result["artifact"]) for result in (found, expected)]
    layouts = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in folders]
    assert layouts[0] == layouts[1]
    weights = [load_file(next(folder.glob("*model.safetensors"))) for folder in folders]
    assert {name: value.shape for name, value in weights[0].items()} == {
        name: value.shape for name, value in weights[1].items()
    }
    assert all(value.dtype == torch.float32 for value in weights[0].values())


def test_two_sharded_ranks_train_like_one_process(tiny_model, preferences, tmp_path):
    """Ranks have unequal numbers of packs in most steps: a step is five examples."""
    tree = tree_of(tiny_model, preferences)
    expected = run(tree, tmp_path / "one", "prepare", "cache-ref", "train")
    run(tree, tmp_path / "two", "prepare", "cache-ref")
    sharded = tree_of(tiny_model, preferences, parallel="fsdp")
    found = finish(on_two_ranks(sharded, tmp_path / "two", "train"))
    assert found["audit_max_abs_diff"] == 0.0
    assert_same_run(found, expected)


def test_a_killed_rank_ends_all_and_one_rank_continues_with_two_ranks_shards(
    tiny_model, preferences, tmp_path
):
    """Of an adapter, whose shards are few: the checkpoint holds them and their optimizer alone."""
    changes = {"num_epochs": 3, "parallel": "fsdp", "learning_rate": 1e-4}
    tree = tree_of(tiny_model, preferences, {"name": "lora", "r": 4}, **changes)
    expected = run(tree, tmp_path / "one", "prepare", "cache-ref", "train")
    store = tmp_path / "two"
    run(tree, store, "prepare", "cache-ref")
    process = on_two_ranks(tree, store, "train")
    killed = time.monotonic() + 240
    while not list((store / "policy").glob(".tmp-*/checkpoint-2")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < killed, "no checkpoint was written"
        time.sleep(0.01)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert time.monotonic() - began < 60
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not list((store / "policy").glob("[!.]*")), err
    said: list[str] = []
    resumed = run(tree, store, "train", said=said)
    assert any("Continuing from step" in line for line in said), said
    assert_same_run(resumed, expected)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the launcher's children, in order of rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    by_rank = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((entry[5:] for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            by_rank[int(rank)] = int(child)
    return [by_rank[rank] for rank in sorted(by_rank)]
