"""The stages together: exact anchors at step 0, one cache for every loss, nothing stale, nothing lost."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.artifacts import open_artifact
from cache.errors import AlignError, CorruptError, MachineError, StaleError
from cache.ref_logps import RefLogps
from tests.pipeline.small_run import (
    LN2,
    session,
    settings,
    through_training,
)

# At step 0 policy and reference are the same, so every log-ratio is zero. Closed forms: -log s(0) = ln 2;
# (0 - 1/(2 beta))^2 = 25 at beta 0.1; 1 - s(0) = 1/2; (1 - s(0)) + s(0) = 1; 1.5 ln 2 + ... as in the table.
STEP0 = {
    "dpo": ({"name": "dpo"}, LN2),
    "cdpo": ({"name": "cdpo"}, LN2),
    "dpo_norm": ({"name": "dpo_norm"}, LN2),
    "ipo mean": ({"name": "ipo"}, 25.0),
    "ipo sum": ({"name": "ipo", "normalize": "sum"}, 25.0),
    "kto": ({"name": "kto"}, 0.5),
    "bco": ({"name": "bco"}, LN2),
    "apo_zero": ({"name": "apo_zero"}, 1.0),
    "apo_down": ({"name": "apo_down"}, 1.0),
    "nca": ({"name": "nca"}, 2 * LN2),
    "hinge": ({"name": "hinge"}, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEP0)
def test_step_0_is_exact_in_float32(name: str, tiny_model, shared_preferences, tmp_path_factory) -> None:
    """Prepare, cache, packing, masks, head and metrics have to be right at once for these to hold."""
    store = tmp_path_factory.getbasetemp() / "step0"
    block, expected = STEP0[name]
    tree = settings(
        tiny_model, shared_preferences, loss=block, train={"learning_rate": 3e-4, "num_epochs": 1}
    )
    result = through_training(tree, store)
    assert result["audit_max_abs_diff"] == 0.0
    assert result["step0"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["step0"]["rewards/accuracies"] == 0.5
    assert result["step0"]["rewards/margins"] == 0.0
    assert result["step0"]["logratios/chosen"] == result["step0"]["logratios/rejected"] == 0.0
    assert result["final"]["loss"] < result["step0"]["loss"]


@pytest.mark.slow
def test_a_lack_of_memory_while_scoring_is_one_line_and_keeps_what_was_scored(
    tiny_model, preferences, tmp_path, monkeypatch
) -> None:
    run = session(settings(tiny_model, preferences), tmp_path).run
    run("prepare")
    with monkeypatch.context() as patch:
        patch.setattr("stages.cache_ref.stage.score_unit", lambda *_: torch.empty(1 << 46))
        with pytest.raises(MachineError, match=r"allocate.*is kept\. Lower compute\.tokens_per_batch"):
            run("cache-ref")
    result = run("cache-ref")
    assert result["rows_scored"] == result["rows_needed"] > 0


@pytest.mark.slow
def test_one_reference_pass_serves_every_loss_seed_and_learning_rate(
    tiny_model, preferences, tmp_path
) -> None:
    short = {"max_steps": 1}
    run = session(settings(tiny_model, preferences), tmp_path)
    run.run("prepare")
    first = run.run("cache-ref")
    assert first["rows_scored"] == first["rows_needed"] > 0
    assert first["forwards"] > 0
    for changes in (
        {"loss": {"name": "kto"}},
        {"loss": {"name": "ipo", "beta": 0.3}},
        {"train": {"learning_rate": 5e-4, "seed": 3, "batch_size": 8}},
        {"compute": {"tokens_per_batch": 64}},
    ):
        changes["train"] = {**changes.get("train", {}), **short}
        again = session(settings(tiny_model, preferences, **changes), tmp_path)
        assert again.run("cache-ref")["forwards"] == 0
        assert not again.run("train")["reused"]
    kto = settings(tiny_model, preferences, loss={"name": "kto"}, train=short)
    assert session(kto, tmp_path).run("train")["reused"]


@pytest.mark.slow
def test_more_data_scores_only_the_new_rows(tiny_model, preferences, tmp_path) -> None:
    lines = preferences.read_text().splitlines()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(lines[:12]) + "\n")
    store = tmp_path / "store"
    tree = settings(tiny_model, fewer, prepare={"mismatched": False})
    session(tree, store).run("prepare")
    before = session(tree, store).run("cache-ref")
    tree["data"] = {"path": str(preferences)}
    session(tree, store).run("prepare")
    after = session(tree, store).run("cache-ref")
    assert after["rows_needed"] == before["rows_needed"] * 2
    assert after["rows_scored"] == before["rows_needed"]


@pytest.mark.slow
def test_training_never_opens_the_reference(tiny_model, preferences, tmp_path) -> None:
    """The reference is a folder of its own; after cache-ref it is gone from the disk, and train does not miss it."""
    reference = tmp_path / "reference"
    shutil.copytree(tiny_model, reference)
    tree = settings(tiny_model, preferences, reference={"model": str(reference)})
    run = session(tree, tmp_path / "store")
    run.run("prepare")
    run.run("cache-ref")
    shutil.rmtree(reference)
    opened: list[str] = []
    _watch(opened)
    result = session(tree, tmp_path / "store").run("train")
    assert result["step0"]["loss"] == pytest.approx(LN2, rel=1e-6)
    assert [path for path in opened if str(reference) in path] == []
    assert [path for path in opened if str(tiny_model) in path] != []


def _watch(opened: list[str]) -> None:
    """Record every path opened from now on (audit hooks cannot be removed; later events cost little)."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.fspath(arguments[0]))

    sys.addaudithook(hook)


def _edit_one_weight(folder: Path) -> None:
    """Change one number of the model in place, keeping size and modification time."""
    path = folder / "model.safetensors"
    stat = path.stat()
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
def test_a_model_edited_in_place_is_noticed(tiny_model, preferences, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tree = settings(model, preferences)
    run = session(tree, tmp_path / "store")
    run.run("prepare")
    run.run("cache-ref")
    _edit_one_weight(model)
    with pytest.raises(
        StaleError, match=r"not of the policy's own starting weights: weights: \w+.*align cache-ref"
    ):
        session(tree, tmp_path / "store").run("train")
    assert session(tree, tmp_path / "store").run("cache-ref")["rows_scored"] > 0
    assert not session(tree, tmp_path / "store").run("train")["reused"]


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("cache-ref", "align prepare"), ("train", "align prepare"), ("sample", "align prepare")],
)
def test_a_missing_input_names_the_command_that_makes_it(
    stage, missing, tiny_model, preferences, tmp_path
) -> None:
    with pytest.raises(StaleError, match=missing):
        session(settings(tiny_model, preferences), tmp_path).run(stage)


def test_train_without_the_cache_names_cache_ref(tiny_model, preferences, tmp_path) -> None:
    run = session(settings(tiny_model, preferences), tmp_path)
    run.run("prepare")
    with pytest.raises(StaleError, match="align cache-ref"):
        run.run("train")


@pytest.mark.slow
def test_a_lost_shard_is_named_before_anything_is_trained(tiny_model, preferences, tmp_path) -> None:
    run = session(settings(tiny_model, preferences), tmp_path)
    run.run("prepare")
    folder = Path(run.run("cache-ref")["artifact"])
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(StaleError, match=r"missing for \d+ of \d+ rows.*align cache-ref"):
        session(settings(tiny_model, preferences), tmp_path).run("train")
    assert not list((tmp_path / "policy").glob("*/*.safetensors"))


@pytest.mark.slow
def test_the_audit_stops_a_store_whose_values_were_changed_consistently(
    tiny_model, preferences, tmp_path
) -> None:
    """Checksums cannot see it: every shard is valid, one number in it is not this model's."""
    tree = settings(tiny_model, preferences)
    run = session(tree, tmp_path)
    run.run("prepare")
    folder = Path(run.run("cache-ref")["artifact"])
    stored = json.loads((folder / "manifest.json").read_text())["identity"]
    reference = RefLogps(folder, stored)
    keys = list(reference.keys())
    values = [reference.get(key).copy() for key in keys]
    for value in values:
        value[0] -= 0.25
    for shard in folder.glob("*.arrow"):
        shard.unlink()
    RefLogps(folder, stored).add(keys, values)
    with pytest.raises(CorruptError, match=r"completion token 0: the cached reference log-prob is"):
        session(tree, tmp_path).run("train")


@pytest.mark.slow
def test_a_diverging_run_stops_with_step_and_rows(tiny_model, preferences, tmp_path) -> None:
    tree = settings(
        tiny_model, preferences, train={"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0}
    )
    with pytest.raises(AlignError, match=r"Step \d+ has loss .*preferences"):
        through_training(tree, tmp_path)
    assert not list((tmp_path / "policy").glob("*/manifest.json"))


@pytest.mark.slow
def test_the_policy_folder_is_a_model_that_transformers_opens(tiny_model, preferences, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = through_training(settings(tiny_model, preferences), tmp_path)
    folder = Path(result["artifact"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    start = load_file(tiny_model / "model.safetensors")
    assert any(
        not torch.equal(start[name], tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
    )
    assert model.config._attn_implementation != "align_tree"
    assert not list(folder.glob("checkpoint-*"))
    open_artifact(folder).check_files()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(result["steps"] + 1))


def test_a_dry_run_writes_nothing(tiny_model, preferences, tmp_path) -> None:
    stages = session(settings(tiny_model, preferences), tmp_path / "store").dry_run("run").stages
    assert stages["prepare"].would == "read and tokenize"
    assert "align prepare" in stages["train"].would
    assert not (tmp_path / "store").exists()
