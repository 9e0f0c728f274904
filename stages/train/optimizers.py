"""The optimizer of a training run, by the name and the fields of `train`.

`adamw` is torch's fused AdamW on float32 masters. The others keep less beside each weight; what that
costs is in docs/memory.md.
"""

from collections.abc import Callable
from typing import Any

import torch

from stages.settings.train import TrainSettings
from stages.train.adamw_bf16 import AdamWBf16

# Bytes of state that each optimizer keeps for a trained weight.
STATE_BYTES = {
    "adamw": 8.0,
    "adamw_bf16": 4.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "adafactor": 0.0,
    "rmsprop": 4.0,
    "sgd": 0.0,
}
NEEDS_BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit")
# bitsandbytes has no state for sharded tensors; the norms of torch's Adafactor fail on them (torch 2.13).
NOT_SHARDED = (*NEEDS_BITSANDBYTES, "adafactor")


def make_optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer over the parameters that are trained; weight decay acts on matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return _make(settings)([group for group in groups if group["params"]])


def _make(settings: TrainSettings) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    name = settings.optimizer
    adam = {"lr": 0.0, "betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    if name in NEEDS_BITSANDBYTES:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

        cls = AdamW8bit if name == "adamw_8bit" else PagedAdamW8bit
        return lambda groups: cls(groups, **adam)
    return {
        "adamw": lambda groups: torch.optim.AdamW(groups, **adam, fused=True),
        "adamw_bf16": lambda groups: AdamWBf16(groups, **adam, seed=settings.seed),
        "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.0),
        "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.0),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0),
    }[name]
