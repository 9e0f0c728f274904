"""The share of weights that a step changes: nearly all of float32, few of bfloat16, whatever gets no gradient."""

import pytest
import torch
from torch import nn

from stages.runtime.distributed import World
from stages.train.monitoring.health import CHANGED_SHARE
from stages.train.monitoring.weight_updates import WeightUpdates

RATE = 5e-7  # the shipped rates of preference losses


def share_of_a_step(dtype: torch.dtype, seen: int) -> float:
    """An AdamW step of an embedding of 2,000 tokens, of which so many occur, and a matrix behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 8, bias=False)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model(torch.arange(seen)).float().square().sum().backward()
    updates = WeightUpdates(parameters)
    updates.before_step()
    optimizer.step()
    return updates.changed_share(World())


@pytest.mark.parametrize("seen", [20, 2000])
def test_a_step_changes_nearly_all_float32_weights_with_a_gradient(seen) -> None:
    assert share_of_a_step(torch.float32, seen) > 0.99


@pytest.mark.parametrize("seen", [20, 2000])
def test_a_step_changes_few_bfloat16_weights(seen) -> None:
    """The published count for weights of this spread at this rate is 1 %; a warning is due far above."""
    assert share_of_a_step(torch.bfloat16, seen) < 0.05 < CHANGED_SHARE


def test_the_share_without_a_gradient_is_0() -> None:
    parameter = nn.Parameter(torch.ones(10))
    updates = WeightUpdates([parameter])
    updates.before_step()
    assert updates.changed_share(World()) == 0.0
