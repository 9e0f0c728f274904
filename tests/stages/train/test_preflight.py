"""Settings that cannot work are refused before a model is loaded."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cache.errors import MachineError, UsageError
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.preflight import check_settings
from tests.tiny_llama import random_llama

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSource:
    folder = tmp_path_factory.mktemp("model")
    random_llama(0, vocab_size=64, hidden_size=32, intermediate_size=32).save_pretrained(folder)
    return ModelSource("small", folder)


def job(model: ModelSource, adapter: str = "none", four_bit: bool = False, **changes):
    return SimpleNamespace(
        settings=TrainSettings(**changes),
        compute=replace(FLOAT32, load_in_4bit=four_bit),
        adapter=AdapterSettings(name=adapter),
        source=model,
    )


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"four_bit": True}, UsageError, "adapter.name=lora"),
        ({"four_bit": True, "adapter": "lora", "parallel": "fsdp"}, UsageError, "train.parallel=ddp"),
        ({"optimizer": "adamw_8bit", "parallel": "fsdp"}, UsageError, "adamw or adamw_bf16"),
        ({"optimizer": "adafactor", "parallel": "fsdp"}, UsageError, "adamw or adamw_bf16"),
        ({"optimizer": "paged_adamw_8bit"}, MachineError, "Use adamw_8bit"),
        ({"activation_offload": True}, MachineError, "compute.device is cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused_with_a_remedy(model, changes, error, match):
    if (
        importlib.util.find_spec("bitsandbytes") is None
    ):  # its import takes seconds, and nothing here needs it
        pytest.skip("needs bitsandbytes")
    with pytest.raises(error, match=match):
        check_settings(job(model, **changes))


def test_a_missing_package_is_named_with_its_install_command(model, monkeypatch):
    found = Path  # anything that is not None
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("peft", "bitsandbytes") else found
    )
    with pytest.raises(MachineError, match=r"pip install -e '\.\[peft\]'"):
        check_settings(job(model, adapter="lora"))
    with pytest.raises(MachineError, match=r"pip install -e '\.\[bitsandbytes\]'"):
        check_settings(job(model, optimizer="adamw_8bit"))
