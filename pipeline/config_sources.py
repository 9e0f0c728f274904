"""The sources of a configuration, merged to one tree of keys: YAML files, `--set` and `--loss`.

Precedence: YAML files (later ones win, each over the file that it extends) < `--set key=value` < `--loss`. Whatever names
a loss replaces the whole loss block, so that a loss never inherits hyperparameters of another one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.errors import UsageError
from pipeline import yaml_1_2
from stages.settings.data import DataSettings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
EMBEDDED = DataSettings().path  # the name of the quickstart's data, and of its model
MAX_YAML_BYTES = 1 << 20


def merged(files: Sequence[Path], assignments: Sequence[str], loss_name: str | None) -> dict[str, Any]:
    """The keys of YAML files, `key=value` assignments and `--loss`; raises `UsageError`.

    Without a file, the quickstart has its own settings; other data, or another model, has the defaults.
    """
    tree: dict[str, Any] = {}
    for path in files or ([QUICKSTART] if _means_quickstart(assignments) else []):
        _merge(tree, _read_extended(path))
    for assignment in assignments:
        assign(tree, assignment)
    given = _assigned(assignments, "loss")
    # Anything but keys and values is no loss, and is refused as such.
    if loss_name is not None and isinstance(given, Mapping):
        tree["loss"] = {**given, "name": loss_name}
    return tree


def _means_quickstart(assignments: Sequence[str]) -> bool:
    data, policy = (_assigned(assignments, block) for block in ("data", "policy"))
    named = [data.get("path", EMBEDDED), policy.get("model", EMBEDDED)]
    return named == [EMBEDDED, EMBEDDED] and not data.get("sources")


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


def assign(tree: dict[str, Any], assignment: str) -> None:
    """Set one `block.key=value` in the tree; raises `UsageError`."""
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
    set_key(tree, parts, value)


def set_key(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    """Set the key of these names in the tree."""
    if list(parts) == ["loss"]:  # a name, or a block with a name: it replaces the whole block
        tree["loss"] = {"name": value} if isinstance(value, str) else value
        return
    node = tree
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if list(parts) == ["loss", "name"] and node.get("name") != value:
        node.clear()
    node[parts[-1]] = value


def _assigned(assignments: Sequence[str], block: str) -> Any:
    """What assignments put under the name of a block: keys and values, except that `loss=VALUE` can put anything there."""
    tree: dict[str, Any] = {}
    for assignment in assignments:
        assign(tree, assignment)
    return tree.get(block, {})
