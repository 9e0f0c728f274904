"""Training settings that change no result under the other settings, set to their defaults: so they make no new policy.

In: the settings of a run, its number of steps and of held-out examples.  Out: settings with the same effect.
"""

from typing import Any

from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.schedules import arguments_with_effect

ADAM = ("adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit")
ADAM_SETTINGS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def effective_train(settings: TrainSettings, steps_per_epoch: int, largest_eval_set: int) -> TrainSettings:
    """The block `train`; `largest_eval_set` is the number of examples of the largest set that is evaluated."""
    return settings.model_copy(
        update={
            **_length(settings, steps_per_epoch),
            **_evaluation(settings, largest_eval_set),
            **_optimization(settings),
        }
    )


def effective_adapter(settings: AdapterSettings) -> AdapterSettings:
    """The block `adapter`; a list of modules is a set."""
    targets = settings.target_modules
    if isinstance(targets, str):
        return settings
    return settings.model_copy(update={"target_modules": tuple(sorted(set(targets)))})


def _length(settings: TrainSettings, steps_per_epoch: int) -> dict[str, int | None]:
    """`num_epochs` and `max_steps`: whichever of them does not end the run."""
    if settings.max_steps is None:
        return {}
    if settings.max_steps >= steps_per_epoch * settings.num_epochs:
        return {"max_steps": None}
    return {"num_epochs": -(-settings.max_steps // steps_per_epoch)}


def _evaluation(settings: TrainSettings, largest_eval_set: int) -> dict[str, Any]:
    default = TrainSettings()
    found: dict[str, Any] = {
        name: None if metric is None else metric.removeprefix("eval/")
        for name in ("best_metric", "early_stopping_metric")
        for metric in [getattr(settings, name)]
    }
    if settings.early_stopping_metric is None:
        found["early_stopping_patience"] = default.early_stopping_patience
    if (settings.eval_samples or largest_eval_set) >= largest_eval_set:
        fits = default.eval_samples is not None and default.eval_samples >= largest_eval_set
        found["eval_samples"] = default.eval_samples if fits else None
    return found


def _optimization(settings: TrainSettings) -> dict[str, Any]:
    default = TrainSettings()
    unused: list[str] = [] if settings.optimizer in ADAM else [*ADAM_SETTINGS]
    if settings.lr_scheduler_type == "constant":
        unused.append("warmup_ratio")
    found = {name: getattr(default, name) for name in unused}
    return {**found, "lr_scheduler_kwargs": arguments_with_effect(settings)}
