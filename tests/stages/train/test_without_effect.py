"""Settings that change nothing under the other settings name the same policy, and each that does another one."""

from pathlib import Path

import pytest
import torch

from cache.artifacts import Artifact
from stages.generation.requests import Prompt, Sampling
from stages.losses import parse_loss
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.job import Job
from stages.train.samples import PromptPool

TRAINED, HELD_OUT, BATCH = 100, 40, 10


def identity(train: dict | None = None, loss: dict | None = None, adapter: dict | None = None) -> dict:
    """Of a run of 10 steps an epoch."""
    rows = Artifact(
        Path("rows"),
        {"fingerprint": "0" * 64, "counts": {"examples": {"train": TRAINED, "heldout": HELD_OUT}}},
    )
    return Job(
        rows=rows,
        source=ModelSource("model", Path("model")),
        start={},
        reference=None,
        loss=parse_loss({"name": "dpo"} | (loss or {})),
        settings=TrainSettings.model_validate({"batch_size": BATCH} | (train or {})),
        compute=Compute(torch.device("cpu"), torch.float32, 2048),
        adapter=AdapterSettings.model_validate(adapter or {}),
    ).identity


# The arguments of these schedules are transformers', whose import takes seconds.
OF_TRANSFORMERS = pytest.mark.slow
SAME = [
    ({"max_steps": 5, "num_epochs": 1}, {"max_steps": 5, "num_epochs": 7}),
    ({"max_steps": 15, "num_epochs": 2}, {"max_steps": 15, "num_epochs": 3}),
    ({}, {"max_steps": 10}),
    ({"num_epochs": 2}, {"num_epochs": 2, "max_steps": 21}),
    ({}, {"early_stopping_patience": 9}),
    (
        {"early_stopping_metric": "loss", "best_metric": "loss"},
        {"early_stopping_metric": "eval/loss", "best_metric": "eval/loss"},
    ),
    ({}, {"eval_samples": HELD_OUT}),
    ({}, {"eval_samples": None}),
    ({"eval_steps": 10}, {"eval_steps": 11}),
    ({"learning_rate": 1e-6}, {}),
    ({"optimizer": "sgd"}, {"optimizer": "sgd", "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1.0}),
    ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "warmup_ratio": 0.5}),
    pytest.param(
        {"lr_scheduler_type": "polynomial"},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1, "lr_end": 1e-7}},
        marks=OF_TRANSFORMERS,
    ),
    pytest.param(
        {"lr_scheduler_type": "cosine_with_restarts"},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1}},
        marks=OF_TRANSFORMERS,
    ),
]
OTHER = [
    ({"max_steps": 5}, {"max_steps": 6}),
    ({"max_steps": 15, "num_epochs": 1}, {"max_steps": 15, "num_epochs": 2}),
    ({"num_epochs": 1}, {"num_epochs": 2}),
    (
        {"early_stopping_metric": "loss"},
        {"early_stopping_metric": "loss", "early_stopping_patience": 9},
    ),
    ({"eval_samples": 10}, {"eval_samples": 11}),
    ({"eval_steps": 5}, {"eval_steps": 6}),
    ({}, {"adam_beta1": 0.5}),
    ({}, {"warmup_ratio": 0.5}),
    pytest.param(
        {"lr_scheduler_type": "polynomial"},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        marks=OF_TRANSFORMERS,
    ),
    ({}, {"seed": 1}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_a_setting_without_effect_makes_no_new_policy(one: dict, other: dict) -> None:
    assert identity(one) == identity(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_a_setting_with_an_effect_does(one: dict, other: dict) -> None:
    assert identity(one) != identity(other)


def test_ld_alpha_of_one_is_dpo_itself() -> None:
    assert identity(loss={"ld_alpha": 1}) == identity()
    assert identity(loss={"ld_alpha": 0.5}) != identity()


def test_the_order_of_target_modules_is_none() -> None:
    one, other = (
        {"name": "lora", "target_modules": names} for names in (["q_proj", "v_proj"], ["v_proj", "q_proj"])
    )
    assert identity(adapter=one) == identity(adapter=other)
    assert identity(adapter=one) != identity(adapter={"name": "lora", "target_modules": ["q_proj"]})
    assert identity(adapter={"r": 4}) == identity()  # no adapter has no rank


def pool(number: int = 2, strategy: str = "fixed", prompts: int = 5, **sampling) -> PromptPool:
    given = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_tokens": 8, "seed": 0, "num_samples": 1}
    return PromptPool(
        [Prompt(str(index), "", [index]) for index in range(prompts)],
        number,
        strategy,  # type: ignore[arg-type]
        Sampling(**(given | sampling)),
    )


def test_samples_in_training_depend_on_what_is_sampled_alone() -> None:
    assert pool(prompts=5).identity == pool(prompts=9).identity, "the first two are sampled"
    assert pool(number=5).identity == pool(number=9).identity, "there are five"
    assert pool(num_samples=1).identity == pool(num_samples=4).identity, "each prompt once"
    assert pool(temperature=0, top_p=0.5, top_k=7).identity == pool(temperature=0).identity, "greedy"
    assert pool(strategy="random", prompts=5).identity != pool(strategy="random", prompts=9).identity
    assert pool(top_k=7).identity != pool().identity
    assert pool(number=3).identity != pool().identity
