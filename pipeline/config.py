"""The configuration of a run: YAML files, `--set key=value`, named flags, in that order of strength.

Field defaults < YAML < `--set` < named flags. `--loss X` replaces the whole loss block with X's
defaults, so one loss's numbers never slip into another's. Unknown keys are errors with the nearest
name.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator

from cache.errors import UsageError
from stages.losses import LOSSES, parse_loss
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
from stages.settings.train import AdapterSettings, TrainSettings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
MAX_YAML_BYTES = 1 << 20
SECRET = re.compile(r"(^|_)(token|secret|password|api_key)(_|$)", re.IGNORECASE)


# User and password, or a token, inside an address.
ADDRESS_WITH_SECRET = re.compile(r"://[^/\s]*:[^/\s]*@")
# What other trainers call a reference that follows the policy (TR-DPO).
MOVING_REFERENCE = (
    "sync_ref_model",
    "ref_model_sync_steps",
    "ref_model_mixup_alpha",
    "tr_dpo",
    "trdpo",
    "tr-dpo",
)


class RunConfig(Settings):
    """Everything a run needs; one block for each idea."""

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
    track: TrackSettings = TrackSettings()

    @field_validator("loss", mode="before")
    @classmethod
    def _read_loss(cls, value: Any) -> Any:
        return parse_loss(value) if isinstance(value, Mapping) else value

    @property
    def reference_model(self) -> tuple[str, str | None]:
        """Name and revision of the reference: the policy before training unless said otherwise."""
        if self.reference.model is None:
            return self.policy.model, self.policy.revision
        return self.reference.model, self.reference.revision

    def to_yaml(self) -> str:
        """The resolved configuration; loading it gives the same run."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_config(files: Sequence[Path], assignments: Sequence[str], loss_name: str | None) -> RunConfig:
    """Merge YAML files (later ones win), `key=value` assignments and `--loss`; raises `UsageError`."""
    tree: dict[str, Any] = {}
    for path in files or [QUICKSTART]:
        _merge(tree, _read_extended(path))
    for assignment in assignments:
        _assign(tree, assignment)
    if loss_name is not None:
        given = {key: value for key, value in _assigned(assignments, "loss").items() if key != "name"}
        tree["loss"] = {"name": loss_name, **given}
    return build_config(tree)


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
    """Check a nested mapping and turn it into a `RunConfig`."""
    _refuse_secrets(tree, "")
    _refuse_moving_reference(tree)
    _refuse_unknown(tree, RunConfig, "")
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
    value = str(detail["input"])
    return f"{path}: {detail['msg']}, found {value if len(value) <= 60 else value[:57] + '...'}"


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"No such configuration file: {path}. Ready ones are in {CONFIGS.name}/.")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UsageError(f"{path} is larger than {MAX_YAML_BYTES} bytes; that is no configuration.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected keys and values, found {type(tree).__name__}.")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (1e-5 is a number), no duplicate keys, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"aliases (*{self.peek_event().anchor}) are not allowed here; write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        double = next((key for key in keys if keys.count(key) > 1), None)
        if double is not None:
            raise yaml.YAMLError(f"key {double!r} appears twice near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a YAML 1.1 or a YAML 1.2 reader would take for something else."""


_FLOAT = r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"
_INT = r"^[-+]?(0|[1-9]\d*)$"
_BOOL = r"^(true|True|TRUE|false|False|FALSE)$"
_PLAIN = {
    "tag:yaml.org,2002:float",
    "tag:yaml.org,2002:int",
    "tag:yaml.org,2002:bool",
    "tag:yaml.org,2002:timestamp",
}


def _yaml_1_2_resolvers() -> None:
    """YAML 1.1 would read `no` as false, `1:30` as 90 and `1e-5` as text."""
    _Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _PLAIN]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for side in (_Loader, _Dumper):
        side.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))
        side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))
        side.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(_BOOL), list("tTfF"))


_yaml_1_2_resolvers()


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
    if not equals or len(parts) < 2 or not all(parts):
        raise UsageError(
            f"--set {assignment!r}: expected block.key=value, for example --set train.learning_rate=1e-6."
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(
            f"--set {assignment!r}: the value is not valid YAML ({' '.join(str(error).split())})."
        ) from error
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


def _refuse_unknown(tree: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    """Unknown keys, with the nearest known one; keys that would hold a secret, with where it belongs."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in model.model_fields:
            if SECRET.search(str(key)):
                raise UsageError(
                    f"{name}: secrets do not belong in a configuration. Log in with `hf auth login` or `wandb login`, or set HF_TOKEN or WANDB_API_KEY."
                )
            near = difflib.get_close_matches(
                str(key), _all_keys(RunConfig) if not prefix else list(model.model_fields), n=1, cutoff=0.6
            )
            hint = (
                f" Did you mean {prefix}{near[0]}?"
                if near
                else f" Known keys: {', '.join(model.model_fields)}."
            )
            raise UsageError(f"Unknown configuration key {name!r}.{hint}")
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{name}: expected a block of keys ({', '.join(kind.model_fields)}), found {value!r}."
                )
            _refuse_unknown(value, kind, f"{name}.")
        elif key == "loss" and not isinstance(value, Mapping):
            raise UsageError(
                f"loss: expected a block with a name (one of {', '.join(LOSSES)}), found {value!r}."
            )


def _refuse_secrets(value: Any, name: str) -> None:
    """Addresses that carry a user and password; the value itself is not repeated."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _refuse_secrets(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and ADDRESS_WITH_SECRET.search(value):
        raise UsageError(
            f"{name}: an address with a user and password in it would be saved with every result. Log in with "
            f"`hf auth login`, or set HF_TOKEN, and leave them out."
        )


def _refuse_moving_reference(tree: Mapping[str, Any]) -> None:
    blocks = [block for block in tree.values() if isinstance(block, Mapping)]
    named = [str(block["name"]) for block in blocks if isinstance(block.get("name"), str)]
    asked = [str(key) for block in (tree, *blocks) for key in block] + named
    found = next((key for key in asked if key.lower() in MOVING_REFERENCE), None)
    if found is not None:
        raise UsageError(
            f"{found}: a reference that follows the policy while it trains (TR-DPO, arXiv 2404.09656) has no log-probs "
            f"that could be cached. Move it between rounds instead: train, then go on from the result with "
            f"--set policy.model=POLICY (reference.model unset follows it), on new samples or the same rows: "
            f"align prepare, cache-ref, train."
        )


def _all_keys(model: type[BaseModel]) -> list[str]:
    """Block names and dotted keys of a config model."""
    keys = []
    for key, info in model.model_fields.items():
        keys.append(key)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            keys += [f"{key}.{inner}" for inner in info.annotation.model_fields]
    return keys
