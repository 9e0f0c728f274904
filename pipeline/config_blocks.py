"""The blocks of a configuration but the loss, so that their errors come before torch is imported.

In: a tree of keys. Out: `Blocks`, or the first thing in it that no configuration may hold.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from cache.errors import UsageError
from pipeline.config_refusals import SECRET_KEY, refuse
from stages.settings.data import DataSettings, EvalSettings, FilterSettings, PrepareSettings
from stages.settings.fields import (
    ComputeSettings,
    ModelSettings,
    ReferenceSettings,
    SampleSettings,
    Settings,
    TrackSettings,
)
from stages.settings.judge import JudgeSettings
from stages.settings.online import OnlineSettings
from stages.settings.sweep import SweepSettings
from stages.settings.train import AdapterSettings, TrainSettings


class Blocks(Settings):
    """All settings of a run; `loss` as it was given."""

    data: DataSettings = DataSettings()
    filter: FilterSettings = FilterSettings()
    policy: ModelSettings = ModelSettings()
    reference: ReferenceSettings = ReferenceSettings()
    prepare: PrepareSettings = PrepareSettings()
    compute: ComputeSettings = ComputeSettings()
    loss: Any = None
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    sample: SampleSettings = SampleSettings()
    judge: JudgeSettings = JudgeSettings()
    online: OnlineSettings = OnlineSettings()
    sweep: SweepSettings = SweepSettings()
    track: TrackSettings = TrackSettings()


Schema = TypeVar("Schema", bound=Blocks)


def check_blocks(tree: Mapping[str, Any]) -> Blocks:
    """The blocks of a tree of keys; raises `UsageError`."""
    refuse(tree, Blocks)
    return validated(Blocks, tree)


def validated(schema: type[Schema], tree: Mapping[str, Any]) -> Schema:
    """The settings of a tree of keys; raises `UsageError` with every key whose value does not fit."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise UsageError(
            "; ".join(_complaint(detail) for detail in error.errors(include_url=False))
        ) from None


def _complaint(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if SECRET_KEY.search(path.rpartition(".")[2]):  # it may be the secret itself
        return f"{path}: {detail['msg']}"
    value = str(detail["input"])
    return f"{path}: {detail['msg']}, found {value if len(value) <= 60 else value[:57] + '...'}"
