"""YAML 1.2 scalars for PyYAML, which reads YAML 1.1: `1e-5` is a number, `no` and `1:30` are text.

Duplicate keys and aliases are refused. `dump` quotes text that a reader of either version would take for
something else.
"""

import re
from typing import Any

import yaml


def load(text: str) -> Any:
    """The value in a YAML document; raises `ValueError` with a reason of one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump(value: Any) -> str:
    """Plain data as a YAML document, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Refuses what a configuration has no use for: duplicate keys, of which YAML keeps the last, and aliases."""

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
# The scalar types whose YAML 1.1 patterns are left out. Timestamps have none in their place.
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool", "timestamp")}

_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# The dumper keeps the patterns of YAML 1.1 besides, so that it quotes what either version would rewrite.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _side.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
