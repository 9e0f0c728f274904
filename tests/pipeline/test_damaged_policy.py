"""What training made is checked where it is used: by a second training, by eval, sample, merge, and as a model's name."""

import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest

from cache.errors import AlignError, CorruptError, StaleError
from cache.ownership import host
from tests.pipeline.small_run import run, settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
BY_CONFIGURATION = ("train", "eval", "sample")
BY_NAME = (("eval", "eval"), ("sample", "sample"), ("policy", "prepare"))


@pytest.fixture(scope="module")
def trained(tiny_model, shared_preferences, tmp_path_factory) -> tuple[dict, Path, Path]:
    """A configuration, its store, and the policy in it, with a checkpoint."""
    tree = settings(
        tiny_model,
        shared_preferences,
        train={"max_steps": 1, "keep_last": 1, "eval_steps": 1},
        sample={"engine": "transformers", "num_prompts": 1, "max_tokens": 2},
    )
    store = tmp_path_factory.mktemp("damaged") / "store"
    return tree, store, Path(run(tree, store, "prepare", "cache-ref", "train")["artifact"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def files_of(policy: Path) -> list[Path]:
    """All that is loaded of a policy."""
    names = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"]
    return [policy / name for name in (*names, "tokenizer_config.json", "checkpoint-1/model.safetensors")]


def test_a_policy_with_any_file_damaged_is_never_used(trained, tmp_path) -> None:
    """Every two of file, damage and stage; all three together would be three times as many."""
    tree, store, policy = trained
    for number, path in enumerate(files_of(policy)):
        kept = shutil.copy2(path, tmp_path / "kept")
        for kind, (damage, error) in enumerate(
            ((flip, CorruptError), (cut, CorruptError), (os.remove, StaleError))
        ):
            damage(path)
            turn = (number + kind) % 3
            with pytest.raises(error, match=rf"{path} is (damaged|missing).*run `align train` again"):
                run(tree, store, BY_CONFIGURATION[turn])
            block, stage = BY_NAME[turn]
            named = {**tree, block: {**tree.get(block, {}), "model": str(policy)}}
            with pytest.raises(AlignError, match=rf"{path} is (damaged|missing)|config.json is missing"):
                run(named, store, stage)
            shutil.copy2(kept, path)
    assert run(tree, store, "train")["reused"]
    assert run(tree, store, "eval")["sets"]


def test_a_named_checkpoint_is_checked_too(trained, tmp_path) -> None:
    tree, store, policy = trained
    checkpoint = shutil.copytree(policy / "checkpoint-1", tmp_path / "checkpoint-1")
    named = {**tree, "eval": {"model": str(checkpoint)}}
    assert run(named, store, "eval")["sets"]
    flip(checkpoint / "model.safetensors")
    with pytest.raises(CorruptError, match=r"model\.safetensors is damaged"):
        run(named, store, "eval")


def test_completions_with_a_flipped_byte_are_not_reused(trained) -> None:
    tree, store, _ = trained
    [made] = run(tree, store, "sample")["completions"].values()
    completions = Path(made["output"])
    assert run(tree, store, "sample")["reused"]
    flip(completions)
    with pytest.raises(CorruptError, match=rf"{completions} is damaged.*run `align sample` again"):
        run(tree, store, "sample")
    shutil.rmtree(completions.parent)


def test_policies_that_were_exchanged_are_not_each_other(trained, tmp_path) -> None:
    tree, store, policy = deepcopy(trained[0]), shutil.copytree(trained[1], tmp_path / "store"), trained[2]
    policy = store / policy.relative_to(trained[1])
    other = Path(run({**tree, "loss": {"name": "ipo"}}, store, "train")["artifact"])
    policy.rename(store / "aside")
    other.rename(policy)
    (store / "aside").rename(other)
    for stage in BY_CONFIGURATION:
        with pytest.raises(
            StaleError, match=r"another artifact than its name says \(loss\..*name: ipo -> dpo"
        ):
            run(tree, store, stage)


def test_a_checkpoint_of_other_settings_in_the_working_folder_is_not_continued(trained, tmp_path) -> None:
    tree, store = deepcopy(trained[0]), shutil.copytree(trained[1], tmp_path / "store")
    tree["train"] |= {"seed": 5, "max_steps": 2}
    policy = Path(run(tree, store, "train")["artifact"])
    expected = (policy / "model.safetensors").read_bytes()
    working = policy.with_name(f".tmp-{policy.name}")
    shutil.rmtree(policy)
    shutil.copytree(trained[2] / "checkpoint-1", working / "checkpoint-1")
    said: list[str] = []
    assert run(tree, store, "train", said=said)["steps"] == 2
    assert any("Skipping" in line and "train.seed: 0 -> 5" in line for line in said), said
    assert (policy / "model.safetensors").read_bytes() == expected


def test_what_a_killed_cache_ref_was_writing_is_removed_by_the_next(trained) -> None:
    tree, store, _ = trained
    (reference,) = (store / "ref-logps").glob("tiny-*")
    left = reference / f".tmp-shard.{host()}.4194305.0123abcd"
    left.write_bytes(b"cut")
    assert run(tree, store, "cache-ref")["reused"]
    assert not left.exists()
