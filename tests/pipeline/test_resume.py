"""Interrupted training: killed in every phase, signalled, damaged, changed; it ends as the uninterrupted run."""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache.errors import AlignError, BusyError, CorruptError, MachineError, StaleError, UsageError
from stages.train.checkpoints import checkpoint_steps, newest_checkpoint
from stages.train.step.row_scorer import RowScorer
from tests.forked import exit_code, fork, in_child
from tests.full_disk import full_disk
from tests.pipeline.small_run import metrics_of, run, settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def train(tree: dict, store: Path, said: list[str] | None = None) -> dict:
    return run(tree, store, "train", said=said)


@pytest.fixture(scope="module")
def shared_store(tiny_model, shared_preferences, tmp_path_factory) -> tuple[dict, Path]:
    # 18 training examples in steps of 4, so an epoch's fifth step is a partial one; bco carries state from step to step.
    tree = settings(
        tiny_model,
        shared_preferences,
        compute={"tokens_per_batch": 120},
        loss={"name": "bco"},
        train={"eval_steps": 3, "save_steps": 1, "keep_last": 1},
    )
    store = tmp_path_factory.mktemp("resume") / "store"
    run(tree, store, "prepare", "cache-ref")
    return tree, store


@pytest.fixture
def prepared(shared_store, tmp_path) -> tuple[dict, Path]:
    """A configuration, and a store with its rows and reference log-probs."""
    tree, store = shared_store
    return deepcopy(tree), shutil.copytree(store, tmp_path / "store")


@pytest.fixture(scope="module")
def whole_run(shared_store, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """The digest of the uninterrupted run, of all its steps or of the first few; trained once."""
    tree, store = shared_store

    @cache
    def trained(max_steps: int | None = None) -> dict[str, Any]:
        copied = shutil.copytree(store, tmp_path_factory.mktemp("whole") / "store")
        return digest(Path(train(changed(tree, {}, max_steps=max_steps), copied)["artifact"]))

    return trained


def fresh(store: Path) -> Path:
    """The store without any policy."""
    shutil.rmtree(store / "policy", ignore_errors=True)
    return store


def digest(policy: Path) -> dict[str, Any]:
    """All that has to be equal: weights, optimizer and loss state at the end, and the metrics without times."""
    (last,) = policy.glob("checkpoint-*")
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    moments = [value for state in optimizer["state"].values() for value in state.values()]
    return {
        "weights": hashlib.sha256((policy / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": hashlib.sha256(b"".join(value.numpy().tobytes() for value in moments)).hexdigest(),
        "loss_state": json.loads((last / "state.json").read_text())["loss_state"],
        "metrics": metrics_of(policy),
    }


def kill_at_file_effect(number: int, within: str) -> None:
    """SIGKILL this process at the n-th thing it does to a file or folder of `within` (audit events, not mocks)."""
    left = number
    effects = (
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "shutil.rmtree",
        "shutil.copyfile",
    )

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in effects or not any(within in str(argument) for argument in arguments[:2]):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_forward(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL this process as it begins its n-th forward pass: inside a step or an evaluation."""
    calls, score = 0, RowScorer.score

    def counted(self: RowScorer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, batch)

    monkeypatch.setattr(RowScorer, "score", counted)


def test_killed_at_every_file_effect_it_ends_in_the_same_bytes(prepared, whole_run, record_property) -> None:
    """Log lines, checkpoints being written, renamed and removed, the policy being put together and published.

    At every 23rd effect, and with ALIGN_EVERY_CASE, which `make reliability` sets, at every 13th.
    """
    step = 13 if "ALIGN_EVERY_CASE" in os.environ else 23
    tree, store = prepared
    tree["train"]["max_steps"] = 3
    whole = whole_run(3)
    points = 0
    for number in range(1, 1000, step):
        fresh(store)

        def killed(number: int = number) -> None:
            kill_at_file_effect(number, str(store / "policy"))
            train(tree, store)

        if in_child(killed) != -signal.SIGKILL:
            break
        points += 1
        result = train(tree, store)
        assert digest(Path(result["artifact"])) == whole, f"killed at file effect {number}"
        assert not list((store / "policy").glob(".tmp-*")), f"killed at file effect {number}"
    record_property("cases", points)
    assert points >= 78 // step


def test_killed_inside_steps_and_evaluations_twice_it_ends_in_the_same_bytes(
    prepared, whole_run, monkeypatch
) -> None:
    tree, store = prepared
    for number, steps in ((3, 3), (24, None)):
        tree["train"]["max_steps"] = steps
        whole = whole_run(steps)
        fresh(store)
        for again in (number, 7):

            def killed(again: int = again) -> None:
                kill_at_forward(again, monkeypatch)
                train(tree, store)

            assert in_child(killed) == -signal.SIGKILL, again
        assert digest(Path(train(tree, store)["artifact"])) == whole, f"killed at forward {number}"


def interrupted(tree: dict, store: Path, after_steps: int, signum: int, times: int = 1) -> int:
    """Train in a child that signals itself while it takes a step; its exit code."""
    from stages.train.loop import Run

    take = Run._step

    def signalling(self: Run, step: int) -> Any:
        if step == after_steps:
            for _ in range(times):
                os.kill(os.getpid(), signum)
        return take(self, step)

    def work() -> None:
        Run._step = signalling  # type: ignore[method-assign]
        for ending in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, lambda number, _: sys.exit(128 + number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(tree, store)

    return in_child(work)


@pytest.mark.parametrize(
    ("signum", "code", "at", "steps"),
    [(signal.SIGHUP, 129, 2, 3), (signal.SIGINT, 130, 2, 3), (signal.SIGTERM, 143, 5, 10)],
)
def test_a_signal_finishes_the_step_and_saves_it(signum, code, at, steps, prepared, whole_run) -> None:
    """The first two in a short run; the last in the partial step that ends an epoch."""
    tree, store = prepared
    max_steps = None if steps == 10 else steps
    whole = whole_run(max_steps)
    tree["train"] |= {"save_steps": 100, "max_steps": max_steps}
    assert interrupted(tree, store, at, signum) == code
    (working,) = (store / "policy").glob(".tmp-*")
    assert checkpoint_steps(working) == [at]
    said: list[str] = []
    assert digest(Path(train(tree, store, said)["artifact"])) == whole
    assert any(f"Continuing from step {at} of {steps}" in line for line in said)


def test_a_second_signal_ends_at_once(prepared) -> None:
    tree, store = prepared
    tree["train"]["save_steps"] = 100
    assert interrupted(tree, store, 5, signal.SIGTERM, times=2) == 143
    (working,) = (store / "policy").glob(".tmp-*")
    assert checkpoint_steps(working) == []


@pytest.fixture(scope="module")
def killed_store(shared_store, tmp_path_factory) -> Path:
    tree, store = shared_store
    store = shutil.copytree(store, tmp_path_factory.mktemp("killed") / "store")

    def killed() -> None:
        from stages.train.loop import Run

        take = Run._step
        Run._step = lambda self, step: os.kill(os.getpid(), 9) if step == 5 else take(self, step)  # type: ignore
        train(tree, store)

    assert in_child(killed) == -signal.SIGKILL
    return store


@pytest.fixture
def halfway(shared_store, killed_store, tmp_path) -> tuple[dict, Path, Path]:
    """A run that was killed when checkpoints of steps 3 and 4 were there; its working folder."""
    store = shutil.copytree(killed_store, tmp_path / "store")
    (working,) = (store / "policy").glob(".tmp-*")
    assert checkpoint_steps(working) == [4, 3]
    return deepcopy(shared_store[0]), store, working


def test_a_checkpoint_opens_as_a_model(halfway, tiny_model) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, working = halfway
    folder = working / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).chat_template
    start, saved = (load_file(place / "model.safetensors") for place in (tiny_model, folder))
    assert any(not torch.equal(start[name], saved[name]) for name in start)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(halfway) -> None:
    """Every file of the newest one flipped, cut and deleted in turn."""
    _, _, working = halfway
    newest = working / "checkpoint-4"
    names = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "optimizer.pt", "metrics.jsonl", "state.json", "files.json"} <= set(names)
    for name in names:
        for damage in (_flip, _cut, Path.unlink):
            content = (newest / name).read_bytes()
            damage(newest / name)
            said: list[str] = []
            found = newest_checkpoint(working, said.append)
            (newest / name).write_bytes(content)
            if name == "files.json" and damage is _cut:
                continue  # its last byte is a line break
            assert found is not None
            assert found.step == 3, (name, damage)
            assert "checkpoint-4" in said[0]
    assert newest_checkpoint(working, print).step == 4


def test_a_run_goes_on_from_the_older_checkpoint(halfway, whole_run) -> None:
    tree, store, working = halfway
    _flip(working / "checkpoint-4" / "model.safetensors")
    said: list[str] = []
    resumed = digest(Path(train(tree, store, said)["artifact"]))
    assert any("checkpoint-4: model.safetensors is damaged" in line for line in said)
    assert any("Continuing from step 3" in line for line in said)
    assert resumed == whole_run()


def test_the_second_of_two_identical_runs_is_refused_and_the_first_is_as_if_alone(halfway, whole_run) -> None:
    """Both at once would log every step twice and overwrite each other's checkpoints."""
    tree, store, working = halfway
    whole = whole_run()
    go, wait = os.pipe(), os.pipe()

    def first() -> None:
        from stages.train.loop import Run

        take = Run._step

        def slow(self: Run, step: int) -> Any:
            if step == 6:
                os.write(go[1], b".")
                os.read(wait[0], 1)
            return take(self, step)

        Run._step = slow  # type: ignore[method-assign]
        train(tree, store)

    child = fork(first)
    os.read(go[0], 1)
    with pytest.raises(BusyError, match=f"Process {child} on .*since .* is writing {working}"):
        train(tree, store)
    said: list[str] = []
    assert train(changed(tree, {}, seed=1), store, said)["steps"] == 10
    assert not any("interrupted run" in line for line in said), "it is not interrupted, it runs"
    os.write(wait[1], b".")
    assert exit_code(child) == 0
    assert digest(Path(train(tree, store)["artifact"])) == whole


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    prepared, whole_run, tiny_model
) -> None:
    """Files grow up to a limit: none at all, the weights of a checkpoint, its optimizer of twice that size."""
    tree, store = prepared
    tree["train"]["max_steps"] = 3
    whole = whole_run(3)
    weights = (tiny_model / "model.safetensors").stat().st_size
    for limit in (0, weights - 1_000, weights + 10_000):
        fresh(store)
        with (
            full_disk(limit),
            pytest.raises(MachineError, match=r"Cannot write .*policy.*same command again"),
        ):
            train(tree, store)
        assert not list((store / "policy").glob(".tmp-*/.tmp-checkpoint*")), "its space is needed"
        assert digest(Path(train(tree, store)["artifact"])) == whole, limit


def test_a_full_disk_after_some_checkpoints_loses_none(halfway, whole_run) -> None:
    tree, store, _ = halfway
    with full_disk(1_000), pytest.raises(MachineError, match="Cannot write"):
        train(tree, store)
    said: list[str] = []
    resumed = digest(Path(train(tree, store, said)["artifact"]))
    assert any("Continuing from step 4" in line for line in said)
    assert resumed == whole_run()


def test_a_lack_of_memory_in_a_step_is_one_line_and_the_run_goes_on(prepared, whole_run, monkeypatch) -> None:
    tree, store = prepared
    tree["train"]["max_steps"] = 3
    whole = whole_run(3)
    fresh(store)
    calls, score = 0, RowScorer.score

    def greedy(self: RowScorer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return torch.empty(1 << 46) if calls == 8 else score(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(RowScorer, "score", greedy)
        said = r"Out of memory \(.*allocate.*\)\. Lower compute.tokens_per_batch \(now 120\)"
        with pytest.raises(MachineError, match=said):
            train(tree, store)
    assert digest(Path(train(tree, store)["artifact"])) == whole


CHANGES = {
    "train.learning_rate": {"train": {"learning_rate": 2e-3}},
    "train.batch_size": {"train": {"batch_size": 6}},
    "train.seed": {"train": {"seed": 3}},
    "train.num_epochs": {"train": {"num_epochs": 3}},
    "train.warmup_ratio": {"train": {"warmup_ratio": 0.2}},
    "train.lr_scheduler_type": {"train": {"lr_scheduler_type": "cosine"}},
    "train.weight_decay": {"train": {"weight_decay": 0.1}},
    "train.max_grad_norm": {"train": {"max_grad_norm": 2.0}},
    "train.adam_beta2": {"train": {"adam_beta2": 0.99}},
    "loss.beta": {"loss": {"beta": 0.3}},
    "loss.name": {"loss": {"name": "dpo"}},
    "rows": {"prepare": {"max_length": 100}},
}


def changed(tree: dict, changes: dict, **train: Any) -> dict:
    merged = {block: dict(values) for block, values in tree.items()}
    for block, values in (*changes.items(), ("train", train)):
        merged[block] = {**merged[block], **values}
    if changes.get("loss", {}).get("name"):
        merged["loss"] = changes["loss"]
    return merged


def test_another_configuration_is_refused_by_name_or_begins_anew(halfway) -> None:
    tree, store, working = halfway
    for name, changes in CHANGES.items():
        other = changed(tree, changes, resume=str(working))
        if name == "rows":
            run(other, store, "prepare", "cache-ref")
        with pytest.raises(StaleError, match=rf"{name}: .* -> .*resume_override=\[.*{name}"):
            train(other, store)
    said: list[str] = []
    result = train(changed(tree, CHANGES["train.learning_rate"]), store, said)
    assert result["steps"] == 10
    assert any(
        "interrupted run at step 4 has other settings (train.learning_rate: 0.001 -> 0.002)" in line
        and f"train.resume={working / 'checkpoint-4'}" in line
        for line in said
    )
    assert checkpoint_steps(working) == [4, 3]


def test_a_damaged_checkpoint_of_another_run_stops_nothing(halfway) -> None:
    tree, store, working = halfway
    (working / "checkpoint-4" / "state.json").write_text("{")
    assert train(changed(tree, CHANGES["train.learning_rate"], max_steps=1), store)["steps"] == 1


def test_named_changes_continue_and_the_result_says_from_where(halfway) -> None:
    tree, store, working = halfway
    other = changed(
        tree, CHANGES["loss.beta"], resume=str(working), resume_override=["loss.beta"], max_steps=7
    )
    said: list[str] = []
    result = train(other, store, said)
    assert result["steps"] == 7
    assert any(
        "with other settings: loss.beta: 0.1 -> 0.3; train.max_steps: null -> 7" in line for line in said
    )
    manifest = json.loads((Path(result["artifact"]) / "manifest.json").read_text())
    assert manifest["identity"]["continues"]["step"] == 4
    steps = [json.loads(line)["step"] for line in (Path(result["artifact"]) / "metrics.jsonl").open()]
    assert steps == list(range(8))
    assert train(other, store)["reused"]


def test_an_overridden_hyperparameter_of_the_optimizer_takes_effect(halfway) -> None:
    """The optimizer of the checkpoint brings its state, not its weight decay."""
    tree, store, working = halfway
    weights = []
    for decay in (0.0, 0.9):
        over = {"weight_decay": decay, "learning_rate": 0.1, "max_steps": 6, "resume": str(working)}
        names = ["train.weight_decay", "train.learning_rate"]
        result = train(changed(tree, {}, **over, resume_override=names), store)
        weights.append(load_file(Path(result["artifact"]) / "model.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_saving_more_often_is_the_same_run_and_more_steps_need_no_override(halfway) -> None:
    tree, store, working = halfway
    said: list[str] = []
    longer = changed(tree, {}, resume=str(working), max_steps=6, eval_steps=2)
    assert train(longer, store, said)["steps"] == 6
    assert not [line for line in said if "begins at step 0" in line]
    said.clear()
    assert train(changed(tree, {}, save_steps=2, keep_last=0), store, said)["steps"] == 10
    assert any("Continuing from step 4 of 10" in line for line in said)


def test_a_resume_that_cannot_be_says_why(halfway, tmp_path) -> None:
    tree, store, working = halfway
    with pytest.raises(StaleError, match=r"holds no valid checkpoint.*checkpoint-<step>"):
        train(changed(tree, {}, resume=str(tmp_path / "nowhere")), store)
    with pytest.raises(UsageError, match="is at step 4, and this run has 3 steps"):
        train(changed(tree, {}, resume=str(working), max_steps=3), store)
    _flip(working / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(CorruptError, match=r"optimizer\.pt is damaged"):
        train(changed(tree, {}, resume=str(working / "checkpoint-4")), store)


def test_the_last_checkpoints_and_the_best_are_kept(prepared) -> None:
    tree, store = prepared
    result = train(changed(tree, {}, keep_last=3, best_metric="loss", eval_steps=2), store)
    folder = Path(result["artifact"])
    assert checkpoint_steps(folder) == [10, 9, 8]
    values = {
        line["step"]: line["eval/loss"]
        for line in map(json.loads, (folder / "metrics.jsonl").open())
        if "eval/loss" in line and line["step"]
    }
    step = min(values, key=values.__getitem__)
    assert result["best"] == {"metric": "loss", "step": step, "value": values[step]}


def test_the_best_weights_are_published_when_asked(prepared) -> None:
    """The first evaluation orders all held-out pairs, none later more; its checkpoint's weights are the policy."""
    tree, store = prepared
    over = {"learning_rate": 0.05, "warmup_ratio": 0.0, "eval_steps": 1, "keep_last": 10}
    result = train(changed(tree, {}, **over, best_metric="rewards/accuracies", save_best=True), store)
    folder, best = Path(result["artifact"]), result["best"]
    assert best["step"] < 10
    assert result["final"]["rewards/accuracies"] == best["value"]
    kept, published = (
        load_file(place / "model.safetensors") for place in (folder / f"checkpoint-{best['step']}", folder)
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in published.items())
    last = load_file(folder / "checkpoint-10" / "model.safetensors")
    assert any(not torch.equal(last[name], tensor) for name, tensor in published.items())


def test_the_best_weights_may_be_those_of_the_run_that_is_continued(prepared) -> None:
    """Best at step 1 of the first run; the second continues its last checkpoint, and then finds the best damaged."""
    tree, store = prepared
    over = {"learning_rate": 0.05, "warmup_ratio": 0.0, "eval_steps": 1, "best_metric": "rewards/accuracies"}
    first = Path(train(changed(tree, {}, **over, keep_last=9, max_steps=5), store)["artifact"])
    longer = changed(tree, {}, **over, save_best=True, max_steps=7, resume=str(first / "checkpoint-5"))
    policy = Path(train(longer, store)["artifact"])
    best, published = (load_file(place / "model.safetensors") for place in (first / "checkpoint-1", policy))
    assert all(torch.equal(best[name], tensor) for name, tensor in published.items())
    shutil.rmtree(policy)
    _flip(first / "checkpoint-1" / "model.safetensors")
    with pytest.raises(CorruptError, match=r"best weights are those of step 1.*is damaged"):
        train(longer, store)


def test_early_stopping_ends_after_its_patience(prepared) -> None:
    tree, store = prepared
    over = {"learning_rate": 0.05, "warmup_ratio": 0.0, "eval_steps": 1, "num_epochs": 6}
    said: list[str] = []
    result = train(
        changed(tree, {}, **over, early_stopping_metric="rewards/chosen", early_stopping_patience=2),
        store,
        said,
    )
    values = [
        line["eval/rewards/chosen"]
        for line in map(json.loads, (Path(result["artifact"]) / "metrics.jsonl").open())
        if line["step"]
    ]
    assert len(values) == result["steps"] < 30
    assert values.index(max(values)) == len(values) - 3
    assert any("Early stop after step" in line for line in said)


@pytest.mark.parametrize(
    ("train_settings", "message"),
    [
        (
            {"best_metric": "rewards/acuracies"},
            r"train.best_metric is 'rewards/acuracies'.*rewards/accuracies",
        ),
        ({"early_stopping_metric": "f1"}, r"train.early_stopping_metric is 'f1'.*loss"),
        ({"save_best": True}, r"train.best_metric, which is not set"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"min_lr"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"pwr": 2.0}}, r"pwr"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2.0}},
            r"takes no arguments",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_step(train_settings, message, prepared) -> None:
    tree, store = prepared
    with pytest.raises(AlignError, match=message):
        train(changed(tree, {}, **train_settings), store)
