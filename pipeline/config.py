"""The configuration of a run: its schema, and how its sources are merged.

Precedence: field defaults < YAML files < `--set key=value` < `--loss`. Whatever names a loss replaces the whole
loss block, so that a loss never inherits hyperparameters of another one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from cache.errors import UsageError
from pipeline import yaml_1_2
from pipeline.config_refusals import SECRET_KEY, refuse
from stages.losses import parse_loss
from stages.losses.contract import Loss
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

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
EMBEDDED = DataSettings().path  # the name of the quickstart's data, and of its model
MAX_YAML_BYTES = 1 << 20


class RunConfig(Settings):
    """All settings of a run, in blocks."""

    data: DataSettings = DataSettings()
    filter: FilterSettings = FilterSettings()
    policy: ModelSettings = ModelSettings()
    reference: ReferenceSettings = ReferenceSettings()
    prepare: PrepareSettings = PrepareSettings()
    compute: ComputeSettings = ComputeSettings()
    loss: SerializeAsAny[Loss] = Field(default_factory=lambda: parse_loss({"name": "dpo"}))
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    sample: SampleSettings = SampleSettings()
    judge: JudgeSettings = JudgeSettings()
    online: OnlineSettings = OnlineSettings()
    sweep: SweepSettings = SweepSettings()
    track: TrackSettings = TrackSettings()

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
        """The resolved configuration, which loads as the same run."""
        return yaml_1_2.dump(self.model_dump(mode="json"))


def load_config(files: Sequence[Path], assignments: Sequence[str], loss_name: str | None) -> RunConfig:
    """Merge YAML files (later ones win), `key=value` assignments and `--loss`; raises `UsageError`.

    Without a file, the quickstart has its own settings; other data, or another model, has the defaults.
    """
    tree: dict[str, Any] = {}
    for path in files or ([QUICKSTART] if _means_quickstart(assignments) else []):
        _merge(tree, _read_extended(path))
    for assignment in assignments:
        _assign(tree, assignment)
    if loss_name is not None:
        given = {key: value for key, value in _assigned(assignments, "loss").items() if key != "name"}
        tree["loss"] = {"name": loss_name, **given}
    return build_config(tree)


def varied(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """The configuration with further `key=value` assignments, as `--set` takes them; raises `UsageError`."""
    tree = config.model_dump(mode="json")
    for assignment in assignments:
        _assign(tree, assignment)
    return build_config(tree)


def _means_quickstart(assignments: Sequence[str]) -> bool:
    data, policy = (_assigned(assignments, block) for block in ("data", "policy"))
    names = {data.get("path", EMBEDDED), policy.get("model", EMBEDDED)}
    return names == {EMBEDDED} and not data.get("sources")


def _read_extended(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, laid over those of the file that its `extends` names, relative to its own folder."""
    tree = _read_yaml(path)
    if "extends" not in tree:
        return tree
    name = tree.pop("extends")
    if not isinstance(name, str):
        raise UsageError(f"{path}: extends: expected the name of one file, found {name!r}.")
    base, chain = path.parent / name, (*chain, path.resolve())
    if base.resolve() in chain:
        raise UsageError(f"{path}: extends: {name} extends this file in turn. Remove one of the two lines.")
    if not base.is_file():
        raise UsageError(f"{path}: extends: no such file {base}. The name is relative to {path.parent}.")
    merged = _read_extended(base, chain)
    _merge(merged, tree)
    return merged


def build_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping; raises `UsageError`."""
    refuse(tree, RunConfig)
    loss = tree.get("loss", {})
    if loss is not None and "name" not in loss:
        tree = {**tree, "loss": {"name": "dpo", **loss}}
    try:
        return RunConfig.model_validate(tree)
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


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"No such configuration file: {path}. Ready-made ones are in {CONFIGS.name}/.")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UsageError(f"{path} is larger than {MAX_YAML_BYTES} bytes, too large for a configuration.")
    try:
        tree = yaml_1_2.load(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected keys and values, found {type(tree).__name__}.")
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        replaces_loss = key == "loss" and isinstance(value, Mapping) and "name" in value
        if isinstance(value, Mapping) and isinstance(base.get(key), dict) and not replaces_loss:
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _assign(tree: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or (len(parts) < 2 and parts != ["loss"]):
        raise UsageError(
            f"--set {assignment!r}: expected block.key=value, for example --set train.learning_rate=1e-6."
        )
    try:
        value = yaml_1_2.load(text)
    except ValueError as error:
        raise UsageError(f"--set {assignment!r}: the value is not valid YAML ({error}).") from error
    if parts == ["loss"]:  # a name, or a block with a name: it replaces the whole block
        tree["loss"] = {"name": value} if isinstance(value, str) else value
        return
    node = tree
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if parts == ["loss", "name"] and node.get("name") != value:
        node.clear()
    node[parts[-1]] = value


def _assigned(assignments: Sequence[str], block: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for assignment in assignments:
        _assign(tree, assignment)
    return tree.get(block, {})
