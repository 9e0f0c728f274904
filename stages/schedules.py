"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from stages.settings import TrainSettings


def make_schedule(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate as a pure function of the step, from transformers' schedulers."""
    from transformers import get_scheduler

    idle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    warmup = math.ceil(steps * settings.warmup_ratio)
    scheduler: Any = get_scheduler(
        settings.lr_scheduler_type, idle, num_warmup_steps=warmup, num_training_steps=steps
    )
    return scheduler.lr_lambdas[0]
