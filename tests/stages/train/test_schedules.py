"""Learning rates: transformers' after warm-up, and a warm-up in which every step counts."""

import pytest
import torch

from cache.errors import UsageError
from stages.settings.train import TrainSettings
from stages.train.schedules import PLAIN, make_schedule

pytestmark = pytest.mark.slow  # transformers' schedules import peft, which takes seconds

PEAK, STEPS, WARMUP = 2e-4, 40, 8
KWARGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-6, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 10, "min_lr_ratio": 0.1},
}
NAMES = TrainSettings.model_json_schema()["properties"]["lr_scheduler_type"]["enum"]


def rates(name: str, ratio: float = WARMUP / STEPS) -> list[float]:
    settings = TrainSettings(
        lr_scheduler_type=name, lr_scheduler_kwargs=KWARGS.get(name, {}), warmup_ratio=ratio
    )
    schedule = make_schedule(settings, PEAK, STEPS)
    return [schedule(step) for step in range(1, STEPS + 1)]


def theirs(name: str, warmup: int) -> list[float]:
    """The rates that transformers' own scheduler puts into an optimizer, step by step."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)
    scheduler = get_scheduler(
        name, optimizer, warmup, STEPS, scheduler_specific_kwargs=dict(KWARGS.get(name, {}))
    )
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_after_warm_up_the_rates_are_transformers(name: str) -> None:
    assert rates(name)[WARMUP:] == pytest.approx(theirs(name, WARMUP)[WARMUP:], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_rises_from_above_0(name: str) -> None:
    found = rates(name)
    assert min(found[:-1]) > 0
    assert found[:WARMUP] == sorted(found[:WARMUP])
    if name not in KWARGS and name != "constant":
        assert found[:WARMUP] == pytest.approx([PEAK * step / 9 for step in range(1, 9)], rel=1e-12)
        assert theirs(name, WARMUP)[0] == 0.0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "inverse_sqrt"])
def test_without_warm_up_the_first_step_has_the_peak(name: str) -> None:
    assert rates(name, 0.0)[0] == pytest.approx(PEAK, rel=0.01)


def test_an_argument_that_the_schedule_does_not_take_is_named() -> None:
    settings = TrainSettings(lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr_rate": 0.1})
    with pytest.raises(UsageError, match=r"lr_scheduler_type=cosine.*min_lr_rate"):
        make_schedule(settings, PEAK, STEPS)


def test_a_plain_schedule_needs_no_import_and_has_the_bits_of_transformers(monkeypatch) -> None:
    for name in PLAIN:
        with monkeypatch.context() as patch:
            patch.setattr("transformers.get_scheduler", None)  # its import is dear
            found = rates(name)
        assert found[WARMUP:] == theirs(name, WARMUP)[WARMUP:]
