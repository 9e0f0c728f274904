"""The share of weights that a step changes: nearly all of float32, few of bfloat16, whatever gets no gradient."""

import pytest
import torch
from torch import nn

from stages.runtime.distributed import World
from stages.train.monitoring.health import CHANGED_SHARE
from stages.train.monitoring.weight_updates import WeightUpdates

RATE = 5e-7  # the shipped rates of preference losses


def shares_of_a_step(dtype: torch.dtype, seen: int) -> dict[str, float]:
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
    return updates.shares(World(), RATE)


@pytest.mark.parametrize("seen", [20, 2000])
def test_a_step_changes_nearly_all_float32_weights_with_a_gradient(seen) -> None:
    shares = shares_of_a_step(torch.float32, seen)
    assert shares["weights_changed"] > 0.99
    assert shares["weights_too_coarse"] == shares["weights_nonfinite"] == 0.0


@pytest.mark.parametrize("seen", [20, 2000])
def test_a_step_changes_few_bfloat16_weights(seen) -> None:
    """The published count for weights of this spread at this rate is 1 %; a warning is due far above."""
    shares = shares_of_a_step(torch.bfloat16, seen)
    assert shares["weights_changed"] < 0.05 < CHANGED_SHARE
    assert shares["weights_too_coarse"] > 0.95


def test_the_share_without_a_gradient_is_0() -> None:
    parameter = nn.Parameter(torch.ones(10))
    updates = WeightUpdates([parameter])
    updates.before_step()
    assert updates.shares(World(), RATE)["weights_changed"] == 0.0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_counted_as_such_and_not_as_unchanged(value) -> None:
    parameter = nn.Parameter(torch.tensor([value, 1.0, 1.0, 1.0]))
    parameter.grad = torch.ones(4)
    updates = WeightUpdates([parameter])
    updates.before_step()
    with torch.no_grad():
        parameter -= 0.1
    assert updates.shares(World(), 0.1) == {
        "weights_changed": 1.0,
        "weights_too_coarse": 0.0,
        "weights_nonfinite": 0.25,
    }


def test_unchanged_weights_of_enough_precision_are_not_called_coarse() -> None:
    """A gradient far below Adam's epsilon: the weights stay, and a larger learning rate is not what they need."""
    parameter = nn.Parameter(torch.full((4,), 0.02))
    parameter.grad = torch.full((4,), 1e-20)
    updates = WeightUpdates([parameter])
    updates.before_step()
    torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0).step()
    assert updates.shares(World(), RATE) == {
        "weights_changed": 0.0,
        "weights_too_coarse": 0.0,
        "weights_nonfinite": 0.0,
    }
