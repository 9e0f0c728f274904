"""The stages on a GPU: a cache made on a CPU, checkpoints, and FSDP of one rank."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cache.files import sha256_file
from stages.train.loop import Run
from tests.pipeline.small_run import ROOT, metrics_of, run, settings

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def tree_of(model: Path, preferences: Path, device: torch.device, **train) -> dict:
    return settings(
        model,
        preferences,
        compute={"device": device.type, "tokens_per_batch": 512},
        train={"save_steps": 2, "max_steps": 6, **train},
    )


def on_cpu(tree: dict) -> dict:
    return {**tree, "compute": {**tree["compute"], "device": "cpu"}}


def test_a_cache_made_on_a_cpu_serves_a_gpu(tiny_model, preferences, tmp_path, device) -> None:
    """The audit compares the reference's log-probs with the GPU's, and the run starts at log 2."""
    tree, store = tree_of(tiny_model, preferences, device), tmp_path / "store"
    run(on_cpu(tree), store, "prepare", "cache-ref")
    again = run(tree, store, "cache-ref")
    assert (again["reused"], again["forwards"]) == (True, 0)
    trained = run(tree, store, "train")
    print(f"audit: {trained['audit_max_abs_diff']:.3g} nats a token between {device} and a CPU, float32")
    assert trained["audit_max_abs_diff"] <= 1e-4
    assert abs(trained["step0"]["loss"] - 0.6931471805599453) < 1e-4
    on_a_cpu = run(on_cpu(tree), shutil.copytree(store, tmp_path / "cpu"), "train")
    assert trained["final"]["loss"] == pytest.approx(on_a_cpu["final"]["loss"], abs=1e-3)


def test_a_resumed_run_is_the_uninterrupted_run(tiny_model, preferences, tmp_path, device) -> None:
    tree, store = tree_of(tiny_model, preferences, device), tmp_path / "store"
    run(tree, store, "prepare", "cache-ref")
    stores = [shutil.copytree(store, tmp_path / name) for name in ("whole", "again", "stopped")]
    whole, again = (run(tree, place, "train") for place in stores[:2])
    take = Run._step
    with pytest.MonkeyPatch.context() as patch:

        def failing(self: Run, number: int):
            if number == 4:
                raise RuntimeError("the machine went away")
            return take(self, number)

        patch.setattr(Run, "_step", failing)
        with pytest.raises(RuntimeError, match="went away"):
            run(tree, stores[2], "train")
    resumed = run(tree, stores[2], "train")
    digests = [
        sha256_file(Path(result["artifact"]) / "model.safetensors") for result in (whole, again, resumed)
    ]
    assert digests[0] == digests[1], "two runs on this device differ, so a resumed one may"
    assert digests[2] == digests[0]
    assert metrics_of(resumed["artifact"]) == metrics_of(whole["artifact"])


def test_fsdp_of_one_rank_is_plain_training(tiny_model, preferences, tmp_path, device) -> None:
    tree, store = tree_of(tiny_model, preferences, device), tmp_path / "store"
    run(tree, store, "prepare", "cache-ref")
    plain = run(tree, shutil.copytree(store, tmp_path / "plain"), "train")
    tree["train"]["parallel"] = "fsdp"
    config = tmp_path / "fsdp.yaml"
    config.write_text(yaml.safe_dump(tree))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launch, "-m", "pipeline", "train", "-c", str(config), "--store", str(store), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sharded = json.loads(done.stdout)
    for name, value in plain["final"].items():
        assert sharded["final"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
