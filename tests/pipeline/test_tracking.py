"""Dashboards and evaluation sets of real runs: names, steps after a resume, and no secret in any file."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache.errors import StaleError, UsageError
from pipeline.cli import main
from pipeline.config import build_config
from stages.train.loop import Run
from stages.train.monitoring.metrics_log import Tracker, read_metrics
from tests.forked import exit_code, fork
from tests.pipeline.small_run import LN2, run, session, settings

CANARY = "canary0a1b2c3d4e5f60718293a4b5c6d7e8f901234"


def tree_of(model: Path, preferences: Path, train: dict | None = None, **blocks: dict) -> dict:
    steps = {"save_steps": 2, "max_steps": 4, **(train or {})}
    return settings(model, preferences, prepare={"mismatched": False}, train=steps, **blocks)


def train_until_step_4(tree: dict[str, Any], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in `store`; the run ends with an exception as it begins step 4."""
    take = Run._step

    def failing(self: Run, number: int):
        if number == 4:
            raise RuntimeError("the machine went away")
        return take(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", failing)
        with pytest.raises(RuntimeError, match="went away"):
            run(tree, store, "train")


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_a_resume(
    tiny_model, preferences, tmp_path, monkeypatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tree = tree_of(tiny_model, preferences, track={"tensorboard": True})
    run(tree, tmp_path, "prepare", "cache-ref")
    train_until_step_4(tree, tmp_path, monkeypatch)
    result = run(tree, tmp_path, "train")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name == Path(result["artifact"]).name
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    lines = {line["step"]: line for line in read_metrics(Path(result["artifact"]) / "metrics.jsonl")}
    assert list(lines) == [0, 1, 2, 3, 4]
    for name, steps in (
        ("train/loss", [1, 2, 3, 4]),
        ("eval/loss", [0, 2, 4]),
        ("eval/rewards/margins", [0, 2, 4]),
    ):
        points = events.Scalars(name)
        assert [point.step for point in points] == steps
        plain = name.removeprefix("train/")
        assert [point.value for point in points] == pytest.approx([lines[step][plain] for step in steps])


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format behind 7 bytes of W&B's own."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_own_wandb_run(tiny_model, preferences, tmp_path, monkeypatch) -> None:
    """Offline: both parts are written under the id that lies in the run's folder, and say each point's step."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    tree = tree_of(tiny_model, preferences, track={"wandb": "offline"})
    run(tree, tmp_path, "prepare", "cache-ref")
    train_until_step_4(tree, tmp_path, monkeypatch)
    (stored,) = (tmp_path / "policy").glob(".tmp-*/wandb-id")
    name = stored.read_text()
    policy = Path(run(tree, tmp_path, "train")["artifact"])
    found = []
    for file in sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/*.wandb"), key=os.path.getmtime):
        records = [Record.FromString(data) for data in wandb_records(file)]
        items = [item for record in records for item in record.history.item]
        steps = [
            int(item.value_json) for item in items if "train/global_step" in (item.key, *item.nested_key)
        ]
        found.append(({record.run.run_id for record in records if record.HasField("run")}, steps))
    assert found == [({name}, [0, 1, 2, 3]), ({name}, [3, 4])]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert [line["step"] for line in read_metrics(policy / "metrics.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_win_rate_is_added_to_the_last_step_of_the_run(
    tiny_model, preferences, tmp_path, monkeypatch
) -> None:
    """W&B's run of the training gets one more point; TensorBoard keeps all that training logged."""
    pytest.importorskip("wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from wandb.proto.wandb_internal_pb2 import Record

    (tmp_path / "long_rules.py").write_text("def longest(prompt, completion): return len(completion)\n")
    monkeypatch.syspath_prepend(tmp_path)
    tree = tree_of(
        tiny_model,
        preferences,
        track={"wandb": "offline", "tensorboard": True},
        sample={"engine": "transformers", "max_tokens": 4, "compare": True},
        judge={"function": "long_rules:longest"},
    )
    store = tmp_path / "store"
    run(tree, store, "prepare", "cache-ref", "train", "sample")
    [policy] = (store / "policy").iterdir()
    found = session(tree, store).run("eval", judge=True)
    rate = found["judge"]["win_rate"]
    assert (policy / "wandb-id").is_file()
    files = (store / "wandb").glob("offline-run-*/*.wandb")
    records = [Record.FromString(data) for file in files for data in wandb_records(file)]
    names = {record.run.run_id for record in records if record.HasField("run")}
    assert names == {(policy / "wandb-id").read_text()}
    points = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
    ]
    [judged] = [point for point in points if "eval/win_rate" in point]
    assert (judged["train/global_step"], judged["eval/win_rate"]) == (4, rate["rate"])
    events = accumulator.EventAccumulator(str(store / "tensorboard" / policy.name))
    events.Reload()
    assert [point.step for point in events.Scalars("eval/loss")] == [0, 2, 4]
    for name, key in (("rate", "win_rate"), ("low", "win_rate_low"), ("high", "win_rate_high")):
        [point] = events.Scalars(f"eval/{key}")
        assert (point.step, point.value) == (4, pytest.approx(rate[name]))


def test_metrics_continue_without_a_doubled_or_a_cut_line(tmp_path) -> None:
    lines = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(5)]
    run_folder, checkpoint = tmp_path / "run", tmp_path / "checkpoint-2"
    run_folder.mkdir()
    checkpoint.mkdir()
    tracker = Tracker(run_folder)
    tracker.begin(None)
    for line in lines:
        tracker.log(line)
        if line["step"] == 2:
            shutil.copyfile(run_folder / "metrics.jsonl", checkpoint / "metrics.jsonl")
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert read_metrics(run_folder / "metrics.jsonl") == lines
    tracker.begin(checkpoint)
    tracker.log({"step": 3, "loss": None})
    assert [line["step"] for line in read_metrics(run_folder / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_secrets_from_the_environment_reach_no_file(tiny_model, preferences, tmp_path) -> None:
    """W&B offline, TensorBoard and trackio at once, every file they and the run wrote searched for the canary."""
    pytest.importorskip("tensorboard")
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    track = {"wandb": "offline", "tensorboard": True, "trackio": True}
    sampling = {"train": {"sample_steps": 4, "sample_prompts": 2}, "sample": {"max_tokens": 4}}
    tree = tree_of(tiny_model, preferences, track=track, **sampling)
    config, home = tmp_path / "run.yaml", tmp_path / "home"
    config.write_text(yaml.safe_dump(tree))
    home.mkdir()
    secrets = {"HF_TOKEN": f"hf_{CANARY}", "WANDB_API_KEY": CANARY, "MY_PASSWORD": CANARY}
    secrets |= dict.fromkeys(("HTTPS_PROXY", "https_proxy"), f"http://me:{CANARY}@127.0.0.1:9")
    environment = {**secrets, "HOME": str(home), "TRACKIO_DIR": str(home / "trackio"), "HF_HUB_OFFLINE": "1"}
    options = ["-c", str(config), "--store", str(tmp_path / "store")]
    said = tmp_path / "said.txt"

    def three_stages() -> None:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            # It reads its folder from the environment as it is imported, which an earlier test may have done.
            for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
                del sys.modules[name]
            for stage in ("prepare", "cache-ref", "train"):
                sys.argv = ["align", stage, *options]
                main()

    assert exit_code(fork(three_stages, said, environment)) == 0, said.read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    assert any(path.suffix == ".db" for path in (home / "trackio").rglob("*"))
    assert [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "setting",
    [
        f"track.wandb_api_key={CANARY}",
        f"train.hf_token={CANARY}",
        f"data.path=https://me:{CANARY}@example.org/x",
        f"policy.model=https://me:{CANARY}@example.org/x",
        f"eval.sets.a.path=s3://key:{CANARY}@bucket/x",
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(setting, tmp_path) -> None:
    from pipeline.config import load_config

    (tmp_path / "c.yaml").write_text("train: {seed: 1}\n")
    with pytest.raises(UsageError) as caught:
        load_config([tmp_path / "c.yaml"], [setting], None)
    assert CANARY not in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"sync_ref_model": True}},
        {"reference": {"ref_model_mixup_alpha": 0.6}},
        {"loss": {"name": "tr_dpo"}},
        {"ref_model_sync_steps": 64},
    ],
)
def test_a_moving_reference_is_refused_with_the_reason_and_the_way(tree) -> None:
    with pytest.raises(UsageError, match=r"no log-probs that could be cached.*policy\.model=POLICY"):
        build_config(tree)


@pytest.mark.slow
def test_evaluation_sets_go_through_the_stages_and_are_scored_apart(
    tiny_model, preferences, tmp_path
) -> None:
    """Half of the data as a set of its own: its metrics at step 0 are exact, its rows scored once by cache-ref."""
    lines = preferences.read_text().splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(lines[:7]) + "\n")
    store = tmp_path / "store"
    sets = {"sets": {"half": str(half), "again": {"path": str(half), "max_samples": 3}}}
    tree = tree_of(tiny_model, preferences, eval=sets)
    run(tree_of(tiny_model, preferences), store, "prepare")
    with pytest.raises(StaleError, match=r"eval\.sets\.half.*align prepare"):
        run(tree, store, "cache-ref")
    prepared = run(tree, store, "prepare")
    assert {name: part["rows_in"] for name, part in prepared["eval_sets"].items()} == {"half": 7, "again": 3}
    run(tree, store, "cache-ref")
    result = run(tree, store, "train")
    for name in ("half", "again"):
        assert result["step0"][f"{name}/loss"] == pytest.approx(LN2, rel=1e-6)
        assert result["final"][f"{name}/rewards/margins"] > 0
    plain = run(tree_of(tiny_model, preferences), store, "train")
    assert not plain["reused"]
    assert plain["final"]["loss"] == result["final"]["loss"]

    evaluated = run(tree, store, "eval")
    assert evaluated["model"] == Path(result["artifact"]).name
    flat = {
        metric if name == "heldout" else f"{name}/{metric}": value
        for name, metrics in evaluated["sets"].items()
        for metric, value in metrics.items()
        if metric != "examples"
    }
    assert flat == pytest.approx(result["final"], rel=1e-6, abs=1e-6)
    start = run({**tree, "eval": {**sets, "model": str(tiny_model)}}, store, "eval")
    assert start["sets"]["half"]["rewards/accuracies"] == 0.5
    assert start["sets"]["heldout"]["loss"] == pytest.approx(LN2, rel=1e-6)


@pytest.mark.slow
def test_eval_goes_on_from_the_mean_that_training_left(tiny_model, preferences, tmp_path) -> None:
    """bco's metrics of a policy are those its training ended with; another beta's mean is of other rewards."""
    tree = tree_of(tiny_model, preferences, loss={"name": "bco"}, train={"keep_last": 1})
    trained = run(tree, tmp_path, "prepare", "cache-ref", "train")
    policy = Path(trained["artifact"])
    said: list[str] = []
    for folder in (None, str(policy), str(policy / "checkpoint-4")):
        found = run({**tree, "eval": {"model": folder}}, tmp_path, "eval", said=said)
        heldout = {name: value for name, value in found["sets"]["heldout"].items() if name != "examples"}
        assert heldout == pytest.approx(trained["final"], rel=1e-6, abs=1e-6)
        assert found["loss_state"]["reward_count"] == 4 * 8
    assert sum("continues from" in line for line in said) == 3
    other = {**tree, "loss": {"name": "bco", "beta": 0.3}, "eval": {"model": str(policy)}}
    assert run(other, tmp_path, "eval", said=said)["loss_state"] is None
    assert "starts at 0" in said[-1]


@pytest.mark.slow
def test_samples_while_training_change_no_number_and_survive_a_resume(
    tiny_model, preferences, tmp_path, monkeypatch
) -> None:
    sampling = {"sample_steps": 2, "sample_prompts": 3, "sample_strategy": "round_robin"}
    tree = tree_of(tiny_model, preferences, train=sampling, sample={"max_tokens": 6, "num_prompts": 5})
    said: list[str] = []
    run(tree, tmp_path, "prepare", "cache-ref")
    train_until_step_4(tree, tmp_path, monkeypatch)
    (working,) = (tmp_path / "policy").glob(".tmp-*")
    with open(working / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "id": "cut')
    resumed = Path(run(tree, tmp_path, "train", said=said)["artifact"])
    records = read_metrics(resumed / "samples.jsonl")
    assert [record["step"] for record in records] == [0] * 3 + [2] * 3 + [4] * 3
    assert any(line.startswith("Samples at step 4:") for line in said)
    metrics = read_metrics(resumed / "metrics.jsonl")
    assert all(0 <= metrics[step]["samples/repetition_share"] <= 1 for step in (0, 2, 4))
    shutil.rmtree(resumed)
    whole = Path(run(tree, tmp_path, "train")["artifact"])
    assert read_metrics(whole / "samples.jsonl") == records
    silent = Path(run(tree_of(tiny_model, preferences), tmp_path, "train")["artifact"])
    for name in ("model.safetensors",):
        assert (silent / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_when_asked(
    tiny_model, preferences, tmp_path, monkeypatch
) -> None:
    """The second step's gradient is made infinite: it is counted, named, and leaves weights and state alone."""
    from stages.train.policy import Trainable

    clip, calls = Trainable.clip_gradients, 0

    def poisoned(self: Trainable, max_norm: float) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            self.parameters[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
        return clip(self, max_norm)

    monkeypatch.setattr(Trainable, "clip_gradients", poisoned)
    said: list[str] = []
    tree = tree_of(tiny_model, preferences, train={"on_nonfinite": "skip", "eval_steps": 1})
    result = run(tree, tmp_path, "prepare", "cache-ref", "train", said=said)
    lines = read_metrics(Path(result["artifact"]) / "metrics.jsonl")
    assert result["skipped_steps"] == 1
    assert lines[2]["skipped"] == 1
    assert "loss" not in lines[2]
    assert lines[2]["eval/loss"] == lines[1]["eval/loss"] != lines[3]["eval/loss"]
    assert any("Step 2 has loss" in line and "preferences" in line and "skipped" in line for line in said)
    assert any(line.startswith("Warning: 1 of the last 2 steps were skipped") for line in said)
    assert (
        json.loads((Path(result["artifact"]) / "manifest.json").read_text())["counts"]["skipped_steps"] == 1
    )
