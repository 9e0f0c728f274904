"""A sweep end to end: what is done is skipped, what fails is named, devices are shared out, nothing is left running."""

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import typer.main
import yaml

from pipeline.cli import app
from pipeline.config import build_config, load_config
from pipeline.sweep.members import members_of
from pipeline.sweep.runner import (
    Ended,
    Processes,
    _environment,
    config_file,
    each_on_a_device,
    processes,
    until_free,
)
from tests.forking_python import forking_python
from tests.pipeline.small_run import ROOT, run, session, settings

EXAMPLES = ROOT / "docs" / "examples"


def write_sweep(tmp_path: Path, model: Path, data: Path, keys: dict, **sweep) -> Path:
    tree = settings(model, data, prepare={"mismatched": False}, train={"max_steps": 3})
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**tree, "sweep": {"keys": keys, **sweep}}))
    return path


@pytest.mark.slow
def test_finished_trainings_are_kept_and_one_that_diverges_is_named(
    align, tiny_model, preferences, tmp_path, monkeypatch
):
    """One of two is trained before, in this process; the other has a rate at which weights become infinite."""
    store = tmp_path / "store"
    path = write_sweep(tmp_path, tiny_model, preferences, {"train.learning_rate": [1e-3, 1e30]}, seeds=[0])
    first = members_of(load_config([path], [], None))[0]
    before = run(first.config.model_dump(mode="json"), store, "prepare", "cache-ref", "train")
    with forking_python(tmp_path) as python:
        monkeypatch.setattr(sys, "executable", str(python))
        code, out, err = align("sweep", "-c", path, "--store", store, "--json")
    assert code == 5, err
    assert "1 of 2 trainings failed" in err
    result = json.loads(out)
    done, failed = result["trainings"]
    assert (done["artifact"], done["reused"], done["problem"]) == (before["artifact"], True, None)
    assert done["metrics"]["rewards/accuracies"] == before["final"]["rewards/accuracies"]
    assert failed["artifact"] is None
    assert "gradient norm" in failed["problem"]
    rows = len(set(_row_keys(store)))
    assert (result["reference_rows"], result["reference_rows_saved"]) == (rows, rows)
    folder = Path(result["folder"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "results.json").read_text()) == result
    assert [setting["trainings"] for setting in result["settings"]] == [1]


def _row_keys(store: Path) -> list[bytes]:
    from cache.artifacts import open_artifact

    (rows,) = (store / "rows").iterdir()
    shards = [shard for split in ("train-", "heldout-") for shard in open_artifact(rows).shards(split)]
    return [key for shard in shards for key in shard.column("row_key").to_pylist()]


@pytest.mark.slow
def test_a_killed_training_is_named_as_killed(tiny_model, preferences, tmp_path):
    """The process is killed as soon as it is there."""
    (member,) = members_of(build_config({**settings(tiny_model, preferences), "sweep": {"seeds": [0]}}))
    with processes() as own:
        killer = threading.Thread(target=_kill_first, args=[own])
        killer.start()
        ended = own.run(
            "train", config_file(tmp_path, member), str(tmp_path / "store"), tmp_path / "log", None
        )
        killer.join()
    assert ended.code == -signal.SIGKILL
    assert "killed by SIGKILL" in (ended.problem or "")
    assert str(tmp_path / "log") in (ended.problem or "")


def _kill_first(own: Processes) -> None:
    while not own.running:
        time.sleep(0.005)
    os.kill(next(iter(own.running)).pid, signal.SIGKILL)


@pytest.mark.slow
def test_an_interrupt_ends_the_processes_and_starts_no_further_one(tiny_model, preferences, tmp_path):
    members = members_of(build_config({**settings(tiny_model, preferences), "sweep": {"seeds": [0, 1, 2]}}))
    started = []

    def work(member, device):
        started.append(member.number)
        if member.number == 2:
            raise KeyboardInterrupt
        own.run("train", config_file(tmp_path, member), str(tmp_path / "store"), tmp_path / "log", device)

    own = Processes()
    with pytest.raises(KeyboardInterrupt):
        each_on_a_device(members, [0, 1], work, own)
    assert own.running == set()
    assert 3 not in started


def test_a_member_waits_for_what_another_one_is_writing(tmp_path):
    codes = iter([7, 7, 0, 7])
    ended = until_free(lambda: Ended(next(codes), {}, "", tmp_path), pause=0)
    assert ended.code == 0
    assert next(codes) == 7


def test_each_device_trains_one_at_a_time():
    members = members_of(build_config({"sweep": {"seeds": list(range(12))}}))
    busy: Counter = Counter()
    seen = []

    def work(member, device):
        busy[device] += 1
        seen.append((member.number, device, busy[device]))
        time.sleep(0.002)
        busy[device] -= 1

    each_on_a_device(members, [2, 5], work, Processes())
    assert sorted(number for number, _, _ in seen) == list(range(1, 13))
    assert {device for _, device, _ in seen} == {2, 5}
    assert {together for _, _, together in seen} == {1}


def test_a_member_sees_its_own_gpu_and_is_no_rank_of_this_process(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert _environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert _environment(None)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "RANK" not in _environment(1)


def test_the_list_is_one_command_a_line_and_writes_nothing(align, tiny_model, preferences, tmp_path):
    path = write_sweep(
        tmp_path, tiny_model, preferences, {"loss": ["dpo", "simpo"], "train.learning_rate": [1e-6]}
    )
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = align("sweep", "-c", path, "--list")
    assert code == 0
    assert out.splitlines() == [
        f"align train -c {path} --set loss={loss} --set train.learning_rate=1e-06"
        for loss in ("dpo", "simpo")
    ]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_train_reads_the_arguments_that_a_wandb_agent_writes(tmp_path, monkeypatch):
    """wandb's own code fills in the command of the documented sweep."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((EXAMPLES / "wandb-sweep.yaml").read_text())
    chosen = {"loss": "ipo", "loss.beta": 0.25, "train.learning_rate": 1.5e-06}
    arguments = utils.create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in chosen.items()}}
    )
    command = sweep["command"]
    place = command.index("${args_no_hyphens}")
    filled = [*command[command.index("train") : place], *arguments["args_no_hyphens"]]
    (tmp_path / "mine.yaml").write_text("loss: {name: dpo, beta: 0.9}\n")
    monkeypatch.chdir(tmp_path)
    parsed = typer.main.get_command(app).commands["train"].make_context("train", filled[1:]).params  # type: ignore[attr-defined]
    config = load_config(parsed["config"], [*parsed["set_"], *parsed["assignments"]], None)
    assert config.loss.model_dump()["name"] == "ipo"
    assert (config.loss.beta, config.train.learning_rate, config.track.wandb) == (0.25, 1.5e-06, "online")
    assert set(sweep["parameters"]) == set(chosen)


@pytest.mark.slow
def test_the_optuna_example_trains_its_trials_from_one_cache(tiny_model, preferences, tmp_path):
    pytest.importorskip("optuna")
    search = runpy.run_path(str(EXAMPLES / "optuna_sweep.py"))["search"]
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(settings(tiny_model, preferences, train={"max_steps": 2, "learning_rate": None}))
    )
    study = search(path, tmp_path / "store", 2)
    assert len(study.trials) == 2
    assert {Path(trial.user_attrs["artifact"]) for trial in study.trials} == set(
        (tmp_path / "store/policy").iterdir()
    )
    again = session(yaml.safe_load(path.read_text()), tmp_path / "store").run("cache-ref")
    assert again["rows_scored"] == 0


@pytest.mark.slow
def test_the_ray_example_trains_its_trials(tiny_model, preferences, tmp_path):
    pytest.importorskip("ray.tune", reason="Ray is not installed; pip install 'ray[tune]' runs this example")
    search = runpy.run_path(str(EXAMPLES / "ray_tune_sweep.py"))["search"]
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(settings(tiny_model, preferences, train={"max_steps": 2, "learning_rate": None}))
    )
    found = search(path, tmp_path / "store", 2, gpus=0)
    assert len(found) == 2
    assert not found.errors
    assert len(list((tmp_path / "store/policy").iterdir())) == 2
