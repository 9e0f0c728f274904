"""What differs between two artifacts: settings and results.

In: two entries. Out: a line for each key whose values differ.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cache.errors import AlignError
from pipeline import yaml_1_2
from pipeline.catalogue.entries import Entry
from pipeline.config import build_config


@dataclass(frozen=True)
class Difference:
    """A key with the value of either side; None where it has no such key."""

    key: str
    one: Any
    other: Any

    @property
    def change(self) -> str:
        """The difference of two numbers."""
        if isinstance(self.one, (int, float)) and isinstance(self.other, (int, float)):
            return f"{self.other - self.one:+.6g}"
        return ""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def differences(one: Entry, other: Entry) -> dict[str, list[Difference]]:
    """Settings of the configuration, what is hashed beyond it, and results."""
    settings, hashed = (
        _differing(_config(one), _config(other)),
        _differing(_part(one, "identity"), _part(other, "identity")),
    )
    said = {line.key for line in settings}
    beyond = [line for line in hashed if line.key not in said]
    return {
        "settings": settings,
        "identity": beyond,
        "results": _differing(_part(one, "counts"), _part(other, "counts")),
    }


def _config(entry: Entry) -> dict[str, Any]:
    """The settings, with the defaults of today for keys that an older version did not have."""
    path = entry.path / "config.yaml"
    tree = yaml_1_2.load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}
    with suppress(AlignError):  # a key that this version does not have any more
        tree = build_config(tree).model_dump(mode="json")
    return flat(tree)


def _part(entry: Entry, name: str) -> dict[str, Any]:
    return flat(entry.manifest.get(name, {}))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    keys = dict.fromkeys([*one, *other])
    return [Difference(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]
