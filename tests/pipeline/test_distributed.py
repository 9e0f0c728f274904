"""Real gloo ranks under torchrun: sharded and replicated runs are the one-rank run; a killed rank ends them all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config import build_config
from pipeline.run import Session

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "pipeline",
]
# kto scores rows before the step, so ranks meet outside the backward pass too.
TREE = {
    "prepare": {"max_length": 128, "heldout_fraction": 0.25},
    "compute": {"dtype": "float32", "device": "cpu", "tokens_per_batch": 100},
    "loss": {"name": "kto"},
    "train": {"learning_rate": 1e-3, "batch_size": 5, "num_epochs": 2, "eval_steps": 3, "save_steps": 1},
}

pytestmark = pytest.mark.slow


def tree_of(model: Path, preferences: Path, **changes: dict) -> dict:
    tree = {**TREE, "data": {"path": str(preferences)}, "policy": {"model": str(model)}}
    for block, values in changes.items():
        tree[block] = {**tree.get(block, {}), **values}
    return tree


def alone(tree: dict, store: Path, *stages: str, said: list[str] | None = None) -> dict:
    run = Session(build_config(tree), store, say=([] if said is None else said).append)
    return [run.run(stage) for stage in stages][-1]


def launch(tree: dict, store: Path) -> subprocess.Popen[str]:
    config = store.parent / f"{store.name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    return subprocess.Popen(
        [*LAUNCH, "train", "-c", str(config), "--store", str(store), "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def lines_of(result: dict) -> list[dict]:
    return [
        json.loads(line) for line in (Path(result["artifact"]) / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same_run(found: dict, expected: dict) -> None:
    ours, theirs = lines_of(found), lines_of(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, wanted in zip(ours, theirs, strict=True):
        assert line.keys() == wanted.keys()
        for name in {"loss", "grad_norm", "eval/loss", "logps/chosen", "kl"} & wanted.keys():
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), (line["step"], name)
    folders = [Path(result["artifact"]) for result in (found, expected)]
    layouts = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not is_of_optimizer(path))
        for folder in folders
    ]
    assert layouts[0] == layouts[1]
    weights = [load_file(next(folder.glob("*model.safetensors"))) for folder in folders]
    assert {name: value.shape for name, value in weights[0].items()} == {
        name: value.shape for name, value in weights[1].items()
    }
    assert all(value.dtype == torch.float32 for value in weights[0].values())


def is_of_optimizer(path: Path) -> bool:
    """Files of a checkpoint that differ between one whole optimizer and its shards."""
    return path.name in ("optimizer.pt", ".metadata") or path.suffix == ".distcp"


def test_two_sharded_ranks_train_like_one_process(tiny_model, preferences, tmp_path):
    """Ranks have unequal numbers of packs in most steps: a step is five examples.

    They sample the same completions in step, at step 0 before any of the model's own passes, and what they leave
    behind opens as a model.
    """
    watched = {"sample_steps": 4, "sample_prompts": 3, "keep_last": 1}
    tree = tree_of(tiny_model, preferences, train=watched, sample={"max_tokens": 6})
    expected = alone(tree, tmp_path / "one", "prepare", "cache-ref", "train")
    alone(tree, tmp_path / "two", "prepare", "cache-ref")
    tree["train"]["parallel"] = "fsdp"
    found = finish(launch(tree, tmp_path / "two"))
    assert found["audit_max_abs_diff"] == 0.0
    assert_same_run(found, expected)
    ours, theirs = (Path(result["artifact"]) for result in (found, expected))
    assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
    (checkpoint,) = ours.glob("checkpoint-*")
    assert list(checkpoint.glob("*.distcp"))
    opened = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    published = load_file(ours / "model.safetensors")
    assert all(torch.equal(opened[name], value) for name, value in published.items())


@pytest.mark.parametrize(
    ("parallel", "adapter"), [("ddp", {}), ("fsdp", {"name": "lora", "r": 4})], ids=["ddp", "fsdp"]
)
def test_a_killed_rank_ends_all_and_one_rank_continues(parallel, adapter, tiny_model, preferences, tmp_path):
    """What is sharded is an adapter, whose shards are few: the checkpoint holds them and their optimizer alone."""
    changes = {"num_epochs": 3, "parallel": parallel, "learning_rate": 1e-4}
    tree = tree_of(tiny_model, preferences, adapter=adapter, train=changes)
    expected = alone(tree, tmp_path / "one", "prepare", "cache-ref", "train")
    store = tmp_path / "two"
    alone(tree, store, "prepare", "cache-ref")
    process = launch(tree, store)
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
    resumed = alone(tree, store, "train", said=said)
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
