"""The configuration of a run: its schema, loss included.

In: YAML files, `--set key=value` and `--loss`, merged by `config_sources.py`. Out: a `RunConfig`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from pipeline import yaml_1_2
from pipeline.config_blocks import Blocks, validated
from pipeline.config_refusals import refuse
from pipeline.config_sources import assign, merged
from stages.losses import parse_loss
from stages.losses.contract import Loss


class RunConfig(Blocks):
    """All settings of a run, in blocks."""

    loss: SerializeAsAny[Loss] = Field(default_factory=lambda: parse_loss({"name": "dpo"}))

    @field_validator("loss", mode="before")
    @classmethod
    def _read_loss(cls, value: Any) -> Any:
        return parse_loss(value) if isinstance(value, Mapping) else value

    @property
    def reference_model(self) -> tuple[str, str | None]:
        """Name and revision of the reference; the policy before training if `reference.model` is None."""
        if self.reference.model is None:
            return self.policy.model, self.policy.revision
        return self.reference.model, self.reference.revision

    def to_yaml(self) -> str:
        """The resolved configuration, which loads as the same run: with the loss's learning rate and batch size."""
        train = self.train.resolved(self.loss.learning_rate, self.loss.batch_size, self.adapter)
        return yaml_1_2.dump(self.model_copy(update={"train": train}).model_dump(mode="json"))


def load_config(files: Sequence[Path], assignments: Sequence[str], loss_name: str | None) -> RunConfig:
    """The configuration of YAML files, `key=value` assignments and `--loss`; raises `UsageError`."""
    return build_config(merged(files, assignments, loss_name))


def varied(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """The configuration with further `key=value` assignments, as `--set` takes them; raises `UsageError`."""
    tree = config.model_dump(mode="json")
    for assignment in assignments:
        assign(tree, assignment)
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping; raises `UsageError`."""
    refuse(tree, RunConfig)
    loss = tree.get("loss", {})
    if loss is not None and "name" not in loss:
        tree = {**tree, "loss": {"name": "dpo", **loss}}
    return validated(RunConfig, tree)
