"""Rounds over the stages: the score rises, the reference scores the new rows alone, an interrupted run ends the same."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache.errors import DataError, StaleError, UsageError
from pipeline.online import rounds
from tests.pipeline.small_run import run, session, settings, through_training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def score(prompt, completion: str) -> float:
    """A length-neutral reward: the share of letters that are vowels."""
    letters = [letter for letter in completion.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / len(letters) if letters else 0.0


def alternating(prompt, completion: str) -> float:
    return 1.0


def tree_of(model: Path, preferences: Path, **changes: dict) -> dict:
    blocks = {
        "judge": {"function": f"{__name__}:score"},
        "online": {"rounds": 2, "prompts_per_round": 8, "num_samples": 3, "unfinished": "keep"},
        "sample": {"engine": "transformers", "max_tokens": 8, "temperature": 1.0, "num_prompts": 4},
        "train": {"num_epochs": 1, "lr_scheduler_type": "constant"},
    }
    merged = {name: {**blocks.get(name, {}), **changes.get(name, {})} for name in {**blocks, **changes}}
    return settings(model, preferences, **merged)


def weights(folder: str | Path) -> str:
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


# Without held-out prompts no policy is compared with another one.
NOT_COMPARED = {"heldout_fraction": 0.0}


@pytest.fixture(scope="module")
def whole(tiny_model, shared_preferences, tmp_path_factory) -> tuple[dict, dict, Path]:
    """A run of two rounds; beside its store `before-training-2`, which is the store as the second round began to train."""
    tree = tree_of(tiny_model, shared_preferences)
    store, calls = tmp_path_factory.mktemp("online") / "store", 0
    train = rounds.OnlineRun._train

    def copying(self, *rest):
        nonlocal calls
        calls += 1
        if calls == 2:
            shutil.copytree(store, store.with_name("before-training-2"))
        return train(self, *rest)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests that compare bits with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.OnlineRun, "_train", copying)
        result = run(tree, store, "online")
    torch.set_num_threads(threads)
    return tree, result, store


def rows_in(store: Path) -> int:
    """The rows in all stores of reference log-probs, by their own manifests of shards."""
    import pyarrow as pa

    shards = list(store.glob("ref-logps/*/*.arrow"))
    return sum(pa.ipc.open_file(shard).read_all().num_rows for shard in shards)


def test_the_reference_scores_the_new_rows_and_no_others(whole):
    _, result, store = whole
    figures = [one["policy"] for one in result["rounds"]] + [result["last"]]
    scored = sum(one["reference_rows"] for one in result["rounds"])
    pairs = [one["pairs"] for one in result["rounds"]]
    assert 0 < scored <= 2 * sum(pairs)
    assert rows_in(store) == scored + sum(one["reference_rows"] for one in figures)
    assert figures[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert figures[0]["wins"] == (0.5, 0.5, 0.5)


def test_no_prompt_of_a_round_is_held_out_and_none_comes_twice(whole):
    tree, _, store = whole
    online = rounds.OnlineRun(session(tree, store).inputs)
    first, second = online.prompts[:8], online.prompts[8:]
    ids = [tuple(prompt.ids) for prompt in (*first, *second)]
    assert len(set(ids)) == 16
    assert not set(ids) & {tuple(prompt.ids) for prompt in online.heldout}


def test_an_interrupted_run_ends_in_the_same_weights(whole, tmp_path, monkeypatch):
    """Stopped as the second round begins to train; what is done is not done again."""
    tree, result, done = whole
    store, calls = shutil.copytree(done.with_name("before-training-2"), tmp_path / "store"), 0
    train = rounds.OnlineRun._train

    def stopped(self, *rest):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rounds.OnlineRun, "_train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tree, store, "online")
    said: list[str] = []
    again = run(tree, store, "online", said=said)
    assert weights(again["artifact"]) == weights(result["artifact"])
    assert sum("Sampling 8 prompts" in line for line in said) == 0
    assert sum(line.startswith("train: already done") for line in said) == 1


def test_a_judge_without_a_preference_is_an_error_that_says_so(tiny_model, preferences, tmp_path):
    tree = tree_of(tiny_model, preferences, judge={"function": f"{__name__}:alternating"})
    with pytest.raises(DataError, match=r"Round 1 has no pair of 8 prompts: \{'tie': 8\}"):
        run(tree, tmp_path, "online")


def test_best_of_n_trains_on_the_best_alone(tiny_model, preferences, tmp_path):
    tree = tree_of(
        tiny_model, preferences, online={"pairing": "best_of_n", "rounds": 1}, prepare=NOT_COMPARED
    )
    with pytest.raises(UsageError, match=r"best_of_n is for the loss sft, and the loss is dpo"):
        run(tree, tmp_path, "online")
    result = run({**tree, "loss": {"name": "sft"}}, tmp_path, "online")
    assert result["rounds"][0]["reference_rows"] == 0
    assert not (tmp_path / "ref-logps").exists()


def test_the_previous_policy_may_be_the_reference(tiny_model, preferences, tmp_path):
    """Stores of different references are kept apart."""
    tree = tree_of(tiny_model, preferences, online={"reference": "previous"}, prepare=NOT_COMPARED)
    run(tree, tmp_path, "online")
    stores = [path for path in (tmp_path / "ref-logps").iterdir() if path.name != "by-place"]
    assert len(stores) == 2


def test_an_adapter_is_trained_on_from_round_to_round(tiny_model, preferences, tmp_path):
    pytest.importorskip("peft")
    tree = tree_of(tiny_model, preferences, adapter={"name": "lora", "r": 4}, prepare=NOT_COMPARED)
    result = run(tree, tmp_path, "online")
    first, second = (
        load_file(Path(one["trained"]) / "adapter_model.safetensors") for one in result["rounds"]
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_begin_from_takes_over_weights_and_moments(tiny_model, preferences, tmp_path):
    """Two runs of one step on the whole data are one run of two; without the moments they are not."""
    whole = {"batch_size": 100, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "keep_last": 1}
    tree = settings(tiny_model, preferences, train={**whole, "num_epochs": 2, "eval_steps": 1})
    two = through_training(tree, tmp_path)
    tree["train"]["num_epochs"] = 1
    one = run(tree, tmp_path, "train")
    checkpoint = Path(one["artifact"]) / "checkpoint-1"
    tree["train"]["begin_from"] = str(checkpoint)
    on = run(tree, tmp_path, "train")
    assert on["step0"] == one["final"]
    assert on["steps"] == 1
    forgetful = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    state = torch.load(forgetful / "optimizer.pt", weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"].zero_()
    torch.save(state, forgetful / "optimizer.pt")
    listed = json.loads((forgetful / "files.json").read_text())
    listed["optimizer.pt"] = hashlib.sha256((forgetful / "optimizer.pt").read_bytes()).hexdigest()
    (forgetful / "files.json").write_text(json.dumps(listed))
    tree["train"]["begin_from"] = str(forgetful)
    forgot = run(tree, tmp_path, "train")

    def distance(result: dict) -> float:
        ours, theirs = (load_file(Path(r["artifact"]) / "model.safetensors") for r in (result, two))
        return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)

    # The order of the examples in a step differs, which rounds; a step moves a weight by up to the rate.
    assert distance(on) < 1e-2 * distance(forgot)
    assert distance(forgot) > 1e-4


def test_a_checkpoint_of_another_model_is_no_beginning(tiny_model, tiny_base_model, preferences, tmp_path):
    tree = settings(tiny_model, preferences, train={"keep_last": 1, "num_epochs": 1})
    made = through_training(tree, tmp_path)
    checkpoint = next(Path(made["artifact"]).glob("checkpoint-*"))
    other = settings(tiny_model, preferences, train={"num_epochs": 1, "optimizer": "adafactor"})
    other["train"]["begin_from"] = str(checkpoint)
    with pytest.raises(
        StaleError, match=r"train\.begin_from=.* another model or optimizer: train\.optimizer"
    ):
        run(other, tmp_path, "train")


def test_samples_of_a_training_are_scored_beside_its_loss(tiny_model, preferences, tmp_path):
    changes = {"train": {"sample_steps": 2, "sample_prompts": 3, "num_epochs": 1}}
    tree = settings(
        tiny_model, preferences, judge={"function": f"{__name__}:score"}, sample={"max_tokens": 6}, **changes
    )
    folder = Path(through_training(tree, tmp_path)["artifact"])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["samples/score"] for line in lines if "samples/score" in line}
    assert len(scored) >= 3
    for step, mean in scored.items():
        own = [score("", one["completion"]) for one in samples if one["step"] == step]
        assert mean == pytest.approx(sum(own) / len(own))
    tree["judge"] = {}
    assert run(tree, tmp_path, "train")["artifact"] != str(folder)
