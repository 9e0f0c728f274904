"""The learning rate as a pure function of the step: the schedules of transformers, with a first step above 0."""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from cache.errors import UsageError
from stages.settings.train import TrainSettings

# Schedules that have no warm-up, or one whose first step is above 0 in transformers.
STARTS_ABOVE_0 = ("constant", "cosine_warmup_with_min_lr")
# The factor after the warm-up, from the steps done, those left, and both together. They are those of transformers to the
# bit, whose import takes three seconds because it imports peft and bitsandbytes too.
PLAIN: dict[str, Callable[[float, float, int], float]] = {
    "constant": lambda done, left, decay: 1.0,
    "linear": lambda done, left, decay: max(0.0, left / decay),
    "cosine": lambda done, left, decay: max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done / decay)))),
}


def make_schedule(settings: TrainSettings, learning_rate: float, steps: int) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ..., `steps`; raises `UsageError` for arguments that a schedule does not take.

    After the warm-up it is that of transformers. In a warm-up of W steps, step s has s / (W + 1) of the peak, as in
    nanoGPT, where transformers has (s - 1) / W, so that its first step has rate 0.
    """
    name, warmup = settings.lr_scheduler_type, math.ceil(steps * settings.warmup_ratio)
    factor, first, last = _factors(settings, learning_rate, warmup, steps)
    if not all(math.isfinite(end) and end >= 0 for end in (first, last)):
        raise UsageError(
            f"train.lr_scheduler_type={name} with train.lr_scheduler_kwargs={_arguments(settings, steps)} gives a "
            f"learning rate of {first * learning_rate:g} at the first step and {last * learning_rate:g} at the last."
        )

    def rate(step: int) -> float:
        warms_up = step <= warmup and name not in STARTS_ABOVE_0
        position = step * warmup / (warmup + 1) if warms_up else step - 1
        return learning_rate * factor(position)

    return rate


def _factors(
    settings: TrainSettings, learning_rate: float, warmup: int, steps: int
) -> tuple[Callable[[float], float], float, float]:
    """The factor on the peak rate as transformers computes it from a step (from 0), and that of the first and last step."""
    name, arguments = settings.lr_scheduler_type, _arguments(settings, steps)
    if name in PLAIN and not arguments:
        factor = _plain_factor(name, warmup, steps)
        return factor, factor(0), factor(steps - 1)
    from transformers import get_scheduler

    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=learning_rate)
    try:
        scheduler: Any = get_scheduler(name, unused, warmup, steps, scheduler_specific_kwargs=arguments)
        factor = scheduler.lr_lambdas[0]
        return factor, factor(0), factor(steps - 1)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"train.lr_scheduler_type={name} does not take train.lr_scheduler_kwargs={arguments}: {error}. "
            f"Use the names that transformers has for this schedule."
        ) from error


def _plain_factor(name: str, warmup: int, steps: int) -> Callable[[float], float]:
    def factor(step: float) -> float:
        if step < warmup and name not in STARTS_ABOVE_0:
            return step / warmup
        return PLAIN[name](step - warmup, steps - step, max(1, steps - warmup))

    return factor


def arguments_with_effect(settings: TrainSettings) -> dict[str, Any]:
    """`train.lr_scheduler_kwargs` without those that have the values transformers gives them by default."""
    if not settings.lr_scheduler_kwargs:
        return {}
    # Only now: this import is of peft and bitsandbytes too.
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(settings.lr_scheduler_type)]
    defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
    return {
        name: value
        for name, value in settings.lr_scheduler_kwargs.items()
        if name not in defaults or defaults[name] != value
    }


def _arguments(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """The arguments of transformers' schedule, besides the numbers of steps."""
    name, arguments = settings.lr_scheduler_type, dict(settings.lr_scheduler_kwargs)
    if arguments and name in ("constant", "constant_with_warmup"):
        raise UsageError(
            f"train.lr_scheduler_type={name} takes no arguments, and train.lr_scheduler_kwargs has "
            f"{', '.join(arguments)}. Leave them out."
        )
    if name == "warmup_stable_decay":
        # transformers has no default for the length of the decay; a tenth is the choice of the schedule's authors.
        arguments.setdefault("num_decay_steps", math.ceil(steps / 10))
    return arguments
