"""YAML 1.2 scalars for PyYAML, which reads YAML 1.1: `1e-5` is a number, `no` and `1:30` are text.

`load` refuses duplicate keys and aliases. `dump` quotes every text that YAML 1.1 or 1.2 would read as another type.
"""

import re
from typing import Any

import yaml


def load(text: str) -> Any:
    """The value of a YAML document; raises `ValueError` with a one-line reason."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump(value: Any) -> str:
    """Plain data as a YAML document; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Refuses aliases, and duplicate keys, of which PyYAML would keep the last."""

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
    pass


_INT = re.compile(r"^[-+]?(0|[1-9]\d*)$")
_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
# Scalar types whose YAML 1.1 patterns do not apply. YAML 1.2 has no timestamps.
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool", "timestamp")}

_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# The dumper also keeps the patterns of YAML 1.1, so that it quotes for both versions.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _side.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
