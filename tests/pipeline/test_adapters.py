"""An adapter through the stages: the reference store of full training, exact step 0, merge, sampling, resume."""

import hashlib
import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cache.errors import CorruptError, MachineError, StaleError, UsageError
from pipeline.session import Session
from stages import merge as merging
from stages.train import loop
from tests.forked import in_child
from tests.pipeline.small_run import LN2, run, session, settings, through_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed"),
]


def adapter_settings(model: Path, preferences: Path, name: str = "lora", **changes: dict) -> dict:
    tree = settings(model, preferences, adapter={"name": name, "r": 4}, **changes)
    tree["train"]["learning_rate"] = 1e-2
    return tree


@pytest.fixture(scope="module")
def trained_before(tiny_model, shared_preferences, tmp_path_factory) -> tuple[dict, dict, Path]:
    """Settings, the result of train, and the store of a LoRA adapter."""
    tree, store = adapter_settings(tiny_model, shared_preferences), tmp_path_factory.mktemp("lora") / "store"
    return tree, through_training(tree, store), store


@pytest.fixture
def trained(trained_before, tmp_path) -> tuple[dict, dict, Path]:
    """The same with a copy of the store, which a test may change."""
    tree, result, store = trained_before
    own = shutil.copytree(store, tmp_path / "store")
    return tree, {**result, "artifact": str(own / Path(result["artifact"]).relative_to(store))}, own


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_shares_the_store_of_full_training_and_starts_from_it_exactly(
    name, tiny_model, preferences, tmp_path
):
    full = session(settings(tiny_model, preferences), tmp_path)
    full.run("prepare")
    full.run("cache-ref")
    run = session(adapter_settings(tiny_model, preferences, name), tmp_path)
    assert run.run("cache-ref")["forwards"] == 0
    result = run.run("train")
    assert result["audit_max_abs_diff"] == 0.0
    assert result["step0"]["loss"] == pytest.approx(LN2, rel=1e-6)
    assert result["step0"]["rewards/margins"] == 0.0
    assert result["final"]["loss"] < 0.5 * LN2
    names = {path.name for path in Path(result["artifact"]).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl"} <= names
    assert "model.safetensors" not in names


def test_a_merged_model_is_base_and_adapter(tiny_model, trained):
    tree, adapter, store = trained
    merged = session(tree, store).run("merge")
    assert not merged["reused"]
    assert merged["tokens_compared"] > 100
    assert 0 < merged["max_abs_diff"] < 1e-3
    assert session(tree, store).run("merge")["reused"]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        whole, adapted, bare = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (merged["artifact"], adapter["artifact"], tiny_model)
        )
    assert (whole - adapted).abs().max() < 1e-3
    assert (whole - bare).abs().max() > 0.1


def test_a_merge_that_changes_log_probs_is_not_written(trained, monkeypatch):
    tree, _, store = trained
    monkeypatch.setattr(merging, "TOLERANCE", 1e-9)
    with pytest.raises(CorruptError, match="differ from those of base and adapter"):
        session(tree, store).run("merge")
    assert not list((store / "merged").glob("*"))


def test_what_cannot_be_merged_or_trained_on_says_so(tiny_model, preferences, trained, tmp_path):
    tree = settings(tiny_model, preferences, train={"max_steps": 1})
    run = session(tree, tmp_path)
    run.run("prepare")
    run.run("cache-ref")
    with pytest.raises(StaleError, match="align train"):
        session(tree, tmp_path).run("merge")
    run.run("train")
    for ask in (Session.run, Session.dry_run):
        with pytest.raises(UsageError, match="not an adapter"):
            ask(session(tree, tmp_path), "merge")
    _, adapter, _ = trained
    with pytest.raises(UsageError, match=r"holds an adapter, not a model.*align merge"):
        session(settings(Path(adapter["artifact"]), preferences), tmp_path).run("prepare")


def test_eval_gives_the_held_out_metrics_that_training_ended_with(trained):
    tree, adapter, store = trained
    found = session(tree, store).run("eval")["sets"]["heldout"]
    assert found["loss"] == pytest.approx(adapter["final"]["loss"], abs=1e-6)


def sampled(run: Session) -> list[str]:
    [made] = run.run("sample")["completions"].values()
    lines = Path(made["output"]).read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]


def test_sampling_from_the_adapter_is_sampling_from_the_merged_model(tiny_model, trained):
    greedy = {"engine": "transformers", "temperature": 0, "max_tokens": 12}
    tree, _, store = trained
    merged = session(tree, store).run("merge")["artifact"]
    from_adapter = sampled(session({**tree, "sample": greedy}, store))
    assert from_adapter == sampled(session({**tree, "sample": {**greedy, "model": merged}}, store))
    assert from_adapter != sampled(session({**tree, "sample": {**greedy, "model": str(tiny_model)}}, store))


def test_vllm_is_not_started_for_an_adapter_that_it_cannot_run(tiny_model, preferences, tmp_path):
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    tree = adapter_settings(
        tiny_model, preferences, "dora", sample={"engine": "vllm"}, train={"max_steps": 1}
    )
    through_training(tree, tmp_path)
    with pytest.raises(MachineError, match=r"DoRA.*sample\.engine=transformers.*align merge.*sample\.model="):
        session(tree, tmp_path).run("sample")


def test_an_interrupted_adapter_run_resumes_to_the_same_bytes(tiny_model, preferences, tmp_path, one_thread):
    """SIGKILL by the run itself right after a checkpoint; the second run loads adapter and optimizer."""
    tree = adapter_settings(tiny_model, preferences, train={"save_steps": 1, "max_steps": 5, "batch_size": 4})
    whole = through_training(tree, tmp_path / "whole")
    store = tmp_path / "killed"
    run(tree, store, "prepare", "cache-ref")

    def killed() -> None:
        save = loop.save_checkpoint

        def then_die(root: Path, step: int, *rest) -> None:
            save(root, step, *rest)
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.save_checkpoint = then_die
        run(tree, store, "train")

    assert in_child(killed) == -signal.SIGKILL
    folder = next((store / "policy").glob(".tmp-*/checkpoint-3"))
    assert "adapter_model.safetensors" in {path.name for path in folder.iterdir()}
    said: list[str] = []
    resumed = run(tree, store, "train", said=said)
    assert any("Continuing from step 3" in line for line in said)
    digests = [
        hashlib.sha256((Path(result["artifact"]) / "adapter_model.safetensors").read_bytes()).hexdigest()
        for result in (whole, resumed)
    ]
    assert digests[0] == digests[1]


def test_qlora_has_a_reference_store_of_its_own_and_starts_from_it(tiny_model, preferences, tmp_path):
    pytest.importorskip("bitsandbytes")
    full = session(settings(tiny_model, preferences), tmp_path)
    full.run("prepare")
    full.run("cache-ref")
    tree = adapter_settings(tiny_model, preferences, compute={"load_in_4bit": True})
    with pytest.raises(StaleError, match=r"in float32, weights in nf4 are in"):
        session(tree, tmp_path).run("train")
    assert session(tree, tmp_path).run("cache-ref")["rows_scored"] > 0
    result = session(tree, tmp_path).run("train")
    assert result["audit_max_abs_diff"] < 1e-5
    assert result["step0"]["loss"] == pytest.approx(LN2, rel=1e-5)
    assert result["final"]["loss"] < 0.5 * LN2
