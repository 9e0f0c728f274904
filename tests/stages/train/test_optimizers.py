"""Every named optimizer: it learns, its state is as small as said, and it goes on from saved state to the bit."""

import io

import pytest
import torch

from stages.settings.train import TrainSettings
from stages.train.adamw_bf16 import AdamWBf16
from stages.train.optimizers import NEEDS_BITSANDBYTES, STATE_BYTES, make_optimizer

# The import of bitsandbytes takes seconds.
ON_A_CPU = [
    pytest.param(name, marks=pytest.mark.slow if name in NEEDS_BITSANDBYTES else ())
    for name in STATE_BYTES
    if name != "paged_adamw_8bit"
]
NUM_WEIGHTS = 128 * 512


def target() -> torch.Tensor:
    return torch.randn(128, 512, generator=torch.Generator().manual_seed(1))


def made(name: str, start: torch.Tensor | None = None):
    if name in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(128, 512) if start is None else start.clone())
    return weight, make_optimizer([weight], TrainSettings(optimizer=name))


def steps(
    weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int, rate: float = 0.05
) -> float:
    """Descend on the mean squared distance to the target; the last distance."""
    distance = torch.zeros(())
    for _ in range(number):
        optimizer.param_groups[0]["lr"] = rate
        distance = (weight - target()).square().mean()
        distance.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(distance)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_the_optimizer_reduces_the_loss(name):
    weight, optimizer = made(name)
    rate = {"sgd": 5000.0, "adafactor": 0.5}.get(name, 0.05)
    first = steps(weight, optimizer, 1, rate)
    assert steps(weight, optimizer, 60, rate) < 0.5 * first


@pytest.mark.parametrize("name", ON_A_CPU)
def test_optimizer_state_has_the_predicted_size(name):
    weight, optimizer = made(name)
    steps(weight, optimizer, 1)
    tensors = {id(value): value for value in optimizer.state[weight].values() if torch.is_tensor(value)}
    found = sum(value.nbytes for value in tensors.values()) / NUM_WEIGHTS
    assert found == pytest.approx(STATE_BYTES[name], abs=0.07)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_training_from_saved_state_is_equal_to_the_bit(name):
    weight, optimizer = made(name)
    steps(weight, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again, resumed = made(name, weight.detach())
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    steps(weight, optimizer, 3)
    steps(again, resumed, 3)
    assert torch.equal(weight, again)


def test_weight_decay_acts_on_matrices_only():
    matrix, vector = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([matrix, vector], TrainSettings(optimizer="adamw_bf16", weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    matrix.grad, vector.grad = torch.zeros(4, 4), torch.zeros(4)
    optimizer.step()
    assert torch.equal(matrix, torch.full((4, 4), 0.95))
    assert torch.equal(vector, torch.ones(4))


@pytest.mark.slow
def test_moments_in_bfloat16_follow_adamw():
    """Without the random rounding a second moment stops growing long before it is what it should be."""
    found = {}
    gradient = torch.full((64, 64), 1e-3)
    for name, optimizer_of in {
        "float32": lambda weight: torch.optim.AdamW([weight], lr=1e-3),
        "bfloat16": lambda weight: AdamWBf16([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8),
    }.items():
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = optimizer_of(weight)
        for _ in range(500):
            weight.grad = gradient.clone()
            optimizer.step()
        found[name] = optimizer.state[weight]["exp_avg_sq"].float().mean()
    assert found["bfloat16"] == pytest.approx(float(found["float32"]), rel=0.01)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(500):
        nearest = (nearest.float() * 0.999 + 1e-6 * 0.001).bfloat16()
    assert float(nearest) < 0.8 * float(found["float32"])
