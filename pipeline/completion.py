"""What the shell completes: names of losses, configuration files, and keys with their values (`align --install-completion`).

Nothing here imports torch, because the shell waits: the losses are read from their source.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

LOSS_FILES = Path(__file__).resolve().parent.parent / "stages" / "losses"


def losses(incomplete: str) -> list[str]:
    """Names of losses."""
    names = [str(ast.literal_eval(value)) for field, value in _loss_fields() if field == "name" and value]
    return sorted(name for name in names if name.startswith(incomplete))


def config_files(incomplete: str) -> list[str]:
    """YAML files, and folders to go on from."""
    parent = incomplete.rpartition("/")[0]
    found = sorted(Path(parent or ".").glob("*"))
    names = [f"{path}/" for path in found if path.is_dir() and not path.name.startswith(".")]
    names += [str(path) for path in found if path.suffix in (".yaml", ".yml")]
    return [name for name in names if name.startswith(incomplete)]


def assignments(incomplete: str) -> list[str]:
    """`block.key=`, and behind it the values of a key that has a few."""
    key, equals, _ = incomplete.partition("=")
    found = _keys()
    if not equals:
        return [f"{name}=" for name in found if name.startswith(incomplete)]
    return [line for value in found.get(key, ()) if (line := f"{key}={value}").startswith(incomplete)]


@cache
def _keys() -> dict[str, tuple[str, ...]]:
    """Every key with the values that it has by name."""
    from pydantic import BaseModel

    from pipeline.config_blocks import Blocks

    keys: dict[str, tuple[str, ...]] = {"loss": tuple(losses("")), "loss.name": tuple(losses(""))}
    for block, field in Blocks.model_fields.items():
        settings = field.annotation
        if isinstance(settings, type) and issubclass(settings, BaseModel):
            for key, inner in settings.model_fields.items():
                keys[f"{block}.{key}"] = _values(inner.annotation)
    return keys | {f"loss.{field}": () for field, _ in _loss_fields() if field != "name"}


def _values(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _values(part))


@cache
def _loss_fields() -> list[tuple[str, ast.expr | None]]:
    """The fields of all losses, each with its default, from the classes in stages/losses that are losses."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(LOSS_FILES.glob("*.py"))]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return [
        (statement.target.id, statement.value)
        for found in classes
        if any(isinstance(base, ast.Name) and base.id.endswith("Loss") for base in found.bases)
        for statement in found.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if "ClassVar" not in ast.unparse(statement.annotation)
    ]
