"""Completions are found again only if nothing that they depend on has changed in the folder of their model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.artifacts import Store
from cache.errors import StaleError
from stages.generation.requests import Prompt
from stages.models.adapters import attach_adapter, save_adapter
from stages.models.identity import reference_identity
from stages.models.loading import ModelSource, load_model
from stages.runtime.compute import Compute
from stages.sample.job import SampleJob
from stages.settings.fields import SampleSettings
from stages.settings.train import AdapterSettings

COMPUTE = Compute(torch.device("cpu"), torch.float32, 2048)


def identity(folder: Path) -> dict[str, Any]:
    job = SampleJob(
        {"policy": ModelSource("m", folder)}, [Prompt("a", "", [5, 6])], SampleSettings(), COMPUTE, ()
    )
    return job.identity("policy", "transformers")


def set_key(name: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))

    return change


def other_text(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "ByteFallback"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


CHANGES = {
    "weights": one_weight,
    "rope": set_key("config.json", "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
    "end in config": set_key("config.json", "eos_token_id", 7),
    "end in generation config": set_key("generation_config.json", "eos_token_id", [0, 7]),
    "text of ids": other_text,
    "end in tokenizer": set_key("tokenizer_config.json", "eos_token", "<|pad|>"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_completions_depend_on_is_another_identity(name, folder):
    before = identity(folder)
    assert identity(folder) == before
    CHANGES[name](folder)
    assert identity(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        set_key("config.json", "transformers_version", "9"),
        set_key("generation_config.json", "temperature", 9.0),  # sampling takes none of its parameters
    ],
)
def test_what_changes_no_completion_keeps_the_identity(change, folder):
    before = identity(folder)
    change(folder)
    assert identity(folder) == before


def adapter_on(base: Path, folder: Path) -> Path:
    pytest.importorskip("peft")
    source = ModelSource("base", base)
    adapted = attach_adapter(load_model(source, COMPUTE), AdapterSettings(name="lora", r=2), 0, source)
    save_adapter(adapted, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "rope", "end in generation config", "text of ids"])
def test_a_change_of_an_adapters_base_is_another_identity(name, folder, tmp_path):
    adapter = adapter_on(folder, tmp_path / "adapter")
    before = identity(adapter)
    CHANGES[name](folder)
    assert identity(adapter) != before


@pytest.mark.slow
def test_an_adapter_whose_base_is_not_the_one_it_was_trained_on_is_refused(folder, tmp_path):
    """The policy's manifest names the weights that training started from."""
    start = reference_identity(ModelSource("base", folder), COMPUTE)
    draft = Store(tmp_path / "store").draft("adapters", "p", "train", {"start": start})
    adapter_on(folder, draft.path)
    policy = Store(tmp_path / "store").publish(draft, {}, {}, "")
    identity(policy.path)
    one_weight(folder)
    with pytest.raises(StaleError, match=r"was trained on .*model, which has changed since: weights: \w+"):
        identity(policy.path)
