"""The learning rate as a pure function of the step: transformers' shapes, with a warm-up that wastes no step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from cache.errors import UsageError
from stages.settings.train import TrainSettings


def make_schedule(settings: TrainSettings, learning_rate: float, steps: int) -> Callable[[int], float]:
    """Learning rate of step 1, 2, ..., `steps`.

    After warm-up it is that of transformers. In a warm-up of W steps, step s has s / (W + 1) of the peak (as nanoGPT
    and its heirs), where transformers has (s - 1) / W and so trains the first step at rate 0. Raises `UsageError`
    for arguments that the shape does not take.
    """
    from transformers import get_scheduler

    idle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=learning_rate)
    name, warmup = settings.lr_scheduler_type, math.ceil(steps * settings.warmup_ratio)
    given = dict(settings.lr_scheduler_kwargs)
    if given and name in ("constant", "constant_with_warmup"):
        raise UsageError(
            f"train.lr_scheduler_type={name} takes no further arguments, and train.lr_scheduler_kwargs has "
            f"{', '.join(given)}. Leave them out."
        )
    if (
        name == "warmup_stable_decay"
    ):  # transformers asks how long the last part is; a tenth is its authors' choice
        given.setdefault("num_decay_steps", math.ceil(steps / 10))
    try:
        scheduler: Any = get_scheduler(name, idle, warmup, steps, scheduler_specific_kwargs=given)
        factors = [scheduler.lr_lambdas[0](step) for step in (0, steps - 1)]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"train.lr_scheduler_type={name} with train.lr_scheduler_kwargs={given}: {error}. "
            f"The names are those of transformers' schedule of that name."
        ) from error
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        raise UsageError(
            f"train.lr_scheduler_type={name} with train.lr_scheduler_kwargs={given} gives a learning rate of "
            f"{factors[0] * learning_rate:g} at the first step and {factors[1] * learning_rate:g} at the last."
        )
    has_a_first_step = name in ("constant", "cosine_warmup_with_min_lr")

    def rate(step: int) -> float:
        warms_up = step <= warmup and not has_a_first_step
        position = step * warmup / (warmup + 1) if warms_up else step - 1
        return learning_rate * scheduler.lr_lambdas[0](position)

    return rate
