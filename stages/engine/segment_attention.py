"""Attention of a pack, example by example, registered with transformers' attention interface.

In: query, key and value of a pack, and its segments.  Out: attention in which the prompt of an example attends to
itself causally, each completion to the prompt and to itself, and no example to another. There is no mask over the
pack: the prompt with its first completion is one causal call, each further completion one call over
[prompt | completion].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from stages.engine.packs import Segment

NAME = "align_segments"


@dataclass(frozen=True)
class Rules:
    """How a layer attends within a row.

    `scaling`: factor of the scores; None: 1 / sqrt(head_dim). `window`: the last positions that a query sees. `chunk`: the
    length of blocks of the row that do not see each other. `softcap`: bound of the scores. `sinks` (heads,): the score of
    a place that takes part in the softmax and has no value.
    """

    scaling: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def all_visible(self, total: int) -> bool:
        """Whether a query of a row of `total` positions sees every position up to its own."""
        return all(length is None or length >= total for length in (self.window, self.chunk))

    def visible(self, before: int, length: int, total: int, device: torch.device) -> torch.Tensor:
        """Which keys the queries at positions `before`, `before` + 1, ... see: (length, total), bool."""
        keys = torch.arange(total, device=device)
        queries = keys[before : before + length, None]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (queries - keys < self.window)
        return seen if self.chunk is None else seen & (queries // self.chunk == keys // self.chunk)


def chunk_of(module: Any) -> int | None:
    """The length of the blocks that a layer attends within (Llama 4), which transformers has in the mask alone."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if config is None or kinds is None or layer is None or kinds[layer] != "chunked_attention":
        return None
    return config.attention_chunk_size


def segment_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a pack: query (1, heads, positions, head_dim) -> (1, positions, heads, value_dim).

    `key` is (1, key/value heads, positions, head_dim), `value` (1, key/value heads, positions, value_dim), `s_aux` the
    sinks, (heads,).
    """
    assert segments is not None, "the model does not pass its keyword arguments on to its attention"
    dtype = query.dtype
    if query.device.type == "cpu":
        # On a CPU, torch's backward pass in bfloat16 takes 2 to 4 times as long as in float32 below 128 tokens and is
        # no faster above, so autocast would cost both time and precision here.
        query, key, value = query.float(), key.float(), value.float()
    rules = Rules(scaling, sliding_window, chunk_of(module), softcap, s_aux)
    with torch.autocast(query.device.type, enabled=False):
        result = _by_segment(query, key, value, segments, rules)
    return result.transpose(1, 2).to(dtype).contiguous(), None


def _by_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], rules: Rules
) -> torch.Tensor:
    """Attention over a pack: query (1, heads, positions, head_dim) -> (1, heads, positions, value_dim)."""
    sizes = [size for segment in segments for size in _call_sizes(segment)]
    # One split costs one concatenation in the backward pass. A slice for each segment would cost a tensor of zeros of
    # the size of the pack each, nearly half of the time of a training step.
    pieces = zip(*(side.split(sizes, dim=2) for side in (query, key, value)), strict=True)
    results = []
    for segment in segments:
        first_query, first_key, first_value = next(pieces)
        results.append(_attend(first_query, first_key, first_value, 0, rules))
        before = segment.prompt_length
        for _other in segment.completion_lengths[1:]:
            own_query, own_key, own_value = next(pieces)
            # (1, heads, prompt length + completion length, head_dim)
            keys = torch.cat([first_key[:, :, :before], own_key], dim=2)
            values = torch.cat([first_value[:, :, :before], own_value], dim=2)
            results.append(_attend(own_query, keys, values, before, rules))
    return torch.cat(results, dim=2)


def _call_sizes(segment: Segment) -> list[int]:
    """Number of queries of each attention call of an example: prompt and first completion, then each further one."""
    first, *others = segment.completion_lengths or (0,)
    return [segment.prompt_length + first, *others]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: int, rules: Rules
) -> torch.Tensor:
    """Causal attention of queries at positions `before`, `before` + 1, ... over keys from position 0.

    query (1, heads, length, head_dim), key and value (1, key/value heads, total, ...) -> (1, heads, length, value_dim).
    """
    (heads, length), total = query.shape[1:3], key.shape[2]
    if not length:  # a completion of one token has no position in the pack
        return query.new_empty(1, heads, 0, value.shape[-1])
    grouped = heads != key.shape[1]
    is_plain = rules.softcap is None and rules.sinks is None
    if is_plain and not before and rules.all_visible(total):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=rules.scaling, enable_gqa=grouped
        )
    visible = rules.visible(before, length, total, query.device)
    if rules.softcap is not None:
        assert rules.sinks is None, "no layer has both soft-capped scores and sinks"
        return _soft_capped(query, key, value, visible, rules.scaling, rules.softcap)
    if rules.sinks is not None:
        key, value, visible = _with_sinks(key, value, visible, rules.sinks)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=rules.scaling, enable_gqa=grouped
    )


def _with_sinks(
    key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values with one of zeros behind them, and a mask that gives it the sinks: (1, heads, length, total + 1)."""
    hidden = torch.zeros(visible.shape, dtype=key.dtype, device=key.device)
    hidden = hidden.masked_fill(~visible, float("-inf")).expand(len(sinks), -1, -1)
    column = sinks.to(key.dtype)[:, None, None].expand(-1, visible.shape[0], 1)
    key, value = (torch.cat([side, torch.zeros_like(side[:, :, :1])], dim=2) for side in (key, value))
    return key, value, torch.cat([hidden, column], dim=2)[None]


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with scores `softcap * tanh(score / softcap)`, which torch's function leaves out."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (side.repeat_interleave(repeats, dim=1) if repeats > 1 else side for side in (key, value))
    scores = query @ keys.transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = softmax(scores.masked_fill(~visible, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values


def no_mask(*_: Any, **__: Any) -> None:
    """No mask tensor is built: the segments hold the same information."""
    # Needed: under a mask function of transformers' own, restarting positions are read as separate sequences, and the
    # second completion of an example would not see its prompt.


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, no_mask)
