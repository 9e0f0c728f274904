"""What an architecture does otherwise beyond some length, and the same model with those lengths made small.

A window of attention, a chunk, the length from which rotary factors are stretched: with real models these are
thousands of tokens, too many to run at every load. So the self-check runs a copy that shares the model's weights
and in which each of these lengths is `SHORT`; rows of a dozen tokens then lie on both sides of all of them.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SHORT = 8
# Keys of a configuration, and attributes that layers copy from them, that hold such a length in tokens.
LENGTHS = re.compile(r"window|attention_chunk|chunk_length|chunk_size|local_attention|original_max|topk$|floor|extent|budget")
# Of these names, what counts layers, experts or positions to a kernel call.
NO_LENGTHS = re.compile(r"layers|pattern|moe|expert|mamba|feed_forward|lm_head|^chunk_size$|inference")
# What dynamic NTK stretches its factors from.
DYNAMIC = ("max_position_embeddings", "original_max_seq_len", "max_seq_len_cached")


def special_lengths(model: nn.Module) -> dict[str, int]:
    """Lengths in tokens beyond which the model treats a row otherwise, by their names in its configuration."""
    return {name: value for holder in _holders(model) for name, value in _lengths_of(holder, model)}


def with_short_lengths(model: Any, only: int | None = None) -> Any:
    """A copy that shares every weight, its special lengths (or only those of this value) `SHORT`."""
    shared = [*model.parameters(), *(m.quant_state for m in model.modules() if hasattr(m, "quant_state"))]
    short = copy.deepcopy(model, {id(thing): thing for thing in shared})
    for holder in (*_holders(short), *(vars(module) for module in short.modules())):
        for name, value in list(_lengths_of(holder, short)):
            if only is None or value == only:
                holder[name] = SHORT
    return short


def _lengths_of(holder: dict[str, Any], model: nn.Module) -> Iterator[tuple[str, int]]:
    dynamic = DYNAMIC if any(has_dynamic_factors(module) for module in model.modules()) else ()
    for name, value in holder.items():
        named = name in dynamic or (LENGTHS.search(name) and not NO_LENGTHS.search(name))
        if named and isinstance(value, int) and not isinstance(value, bool) and value > SHORT:
            yield name, value


def _holders(model: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries that a model's configurations keep their keys in."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    found = [vars(config) for config in configs.values()]
    ropes = [holder["rope_parameters"] for holder in found if holder.get("rope_parameters")]
    layers = [layer for rope in ropes for layer in rope.values() if isinstance(layer, dict)]
    return [*found, *ropes, *layers]
