"""Lengths beyond which an architecture treats a row otherwise: windows, chunks, stretched rotary factors.

In: a loaded model.  Out: these lengths, the same model with all of them made short, and rotary embeddings that
forget the rows before. Real models have lengths of thousands of tokens, too many to run at every load. In the short
model, which shares the weights, a dozen tokens lie on both sides of every length.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

SHORT = 8
# Keys of a configuration, and attributes that layers copy from them, that hold such a length.
LENGTHS = re.compile(
    r"window|attention_chunk|chunk_length|local_attention|original_max|topk$|floor|extent|budget"
)
# Of these, what counts layers, experts or positions of a kernel call.
OTHER_COUNTS = re.compile(r"layers|pattern|moe|expert|num_|inference")
# From which length on dynamic NTK stretches its factors: in a configuration, which may call it otherwise, and in a module.
STRETCHED = "max_position_embeddings"
STRETCHED_IN_MODULE = ("original_max_seq_len", "max_seq_len_cached")


def special_lengths(model: nn.Module) -> dict[str, int]:
    """Lengths in tokens beyond which the model treats a row otherwise, by their names in its configuration."""
    dynamic = _dynamic_lengths(model)
    return {name: value for keys in _configurations(model) for name, value in _lengths(keys, dynamic)}


def with_short_lengths(model: Any, only: int | None = None) -> Any:
    """A copy that shares every weight, and whose special lengths, or those that are `only`, are `SHORT`."""
    states = [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    short = copy.deepcopy(model, {id(thing): thing for thing in (*model.parameters(), *states)})
    dynamic = _dynamic_lengths(model)
    for keys in (*_configurations(short), *(vars(module) for module in short.modules())):
        for name, value in list(_lengths(keys, dynamic)):
            if only is None or value == only:
                keys[name] = SHORT
    return short


def forget_longer_rows(model: nn.Module) -> None:
    """Make rotary factors depend on the row at hand alone, whatever was scored before.

    Dynamic NTK keeps the factors of the longest row it has seen until a short one comes along, and where layers
    have factors of their own transformers finds no longrope factors a second time.
    """
    for module in model.modules():
        if any(kind == "longrope" or "dynamic" in kind for kind in _rope_kinds(module).values()):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, *_: Any) -> None:
    for layer, kind in _rope_kinds(module).items():
        prefix = f"{layer}_" if layer else ""
        vars(module).pop(f"{prefix}long_inv_freq", None)
        if "dynamic" in kind:
            current, original = (getattr(module, f"{prefix}{name}inv_freq") for name in ("", "original_"))
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _dynamic_lengths(model: Any) -> set[str]:
    """The names of the length that dynamic NTK stretches its factors from, where a model does so."""
    if not any("dynamic" in kind for module in model.modules() for kind in _rope_kinds(module).values()):
        return set()
    names = model.config.get_text_config().attribute_map
    return {names.get(STRETCHED, STRETCHED), *STRETCHED_IN_MODULE}


def _rope_kinds(module: nn.Module) -> dict[str, str]:
    """The kinds of rotary factors of a module, by type of layer; one without types has the type ''."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {"": kinds}
    return kinds if isinstance(kinds, dict) else {}


def _lengths(keys: dict[str, Any], dynamic: set[str]) -> Iterator[tuple[str, int]]:
    for name, value in keys.items():
        named = name in dynamic or (LENGTHS.search(name) and not OTHER_COUNTS.search(name))
        if named and type(value) is int and value > SHORT:
            yield name, value


def _configurations(model: nn.Module) -> list[dict[str, Any]]:
    """The keys of every configuration in a model, and of the rotary embeddings that these hold."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None))
    }
    keys = [vars(config) for config in configs.values()]
    ropes = [found["rope_parameters"] for found in keys if isinstance(found.get("rope_parameters"), dict)]
    return [*keys, *ropes, *(layer for rope in ropes for layer in rope.values() if isinstance(layer, dict))]
