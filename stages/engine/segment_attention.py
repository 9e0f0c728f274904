"""Attention of a pack, segment by segment, plugged into transformers' own attention interface.

Within an example the prompt attends to itself causally, each completion to the prompt and to itself;
examples do not see each other. No mask over the pack exists: the prompt with its first completion is
one causal call, every further completion one call over [prompt | itself].

Leaving the mask out under plain `sdpa` would be silently wrong: transformers reads restarting
positions as separate sequences, and the second completion no longer sees its prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from stages.engine.packs import Segment

NAME = "align_segments"


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a pack: query (1, heads, positions, dim) -> (1, positions, heads, dim)."""
    assert segments is not None, "the model does not hand its keyword arguments down to its attention"
    dtype = query.dtype
    if query.device.type == "cpu":
        # torch's bfloat16 backward pass on a CPU takes 2 to 4 times as long as float32's below 128 tokens
        # and is no faster above, so autocast would cost both time and precision here.
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        result = _by_segment(query, key, value, segments, scaling, sliding_window, softcap)
    return result.transpose(1, 2).to(dtype), None


def _by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Segment],
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention over a pack: (1, heads, positions, dim) -> the same shape."""
    sizes = [size for segment in segments for size in _call_sizes(segment)]
    # Splitting once costs one concatenation in the backward pass; a slice for each segment would cost
    # a pack-sized tensor of zeros each, nearly half of a training step.
    pieces = zip(*(side.split(sizes, dim=2) for side in (query, key, value)), strict=True)
    results = []
    for segment in segments:
        first_query, first_key, first_value = next(pieces)
        results.append(_attend(first_query, first_key, first_value, 0, scaling, sliding_window, softcap))
        before = segment.prompt_length
        for _other in segment.completion_lengths[1:]:
            own_query, own_key, own_value = next(pieces)
            keys = torch.cat([first_key[:, :, :before], own_key], dim=2)
            values = torch.cat([first_value[:, :, :before], own_value], dim=2)
            results.append(_attend(own_query, keys, values, before, scaling, sliding_window, softcap))
    return torch.cat(results, dim=2)


def _call_sizes(segment: Segment) -> list[int]:
    """Queries of each attention call of an example: the prompt with its first completion, then each other."""
    first, *others = segment.completion_lengths or (0,)
    return [segment.prompt_length + first, *others]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of queries at positions `before`, `before` + 1, ... over keys from position 0."""
    length, total = query.shape[2], key.shape[2]
    if not length:  # a completion of one token feeds nothing
        return query
    reach = total if window is None else min(window, total)
    windowed = reach < total
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and not before and not windowed:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    ages = torch.arange(before, before + length, device=query.device)[:, None] - torch.arange(
        total, device=query.device
    )
    visible = (ages >= 0) & (ages < reach)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=grouped
        )
    repeats = query.shape[1] // key.shape[1]
    keys, values = (side.repeat_interleave(repeats, dim=1) if grouped else side for side in (key, value))
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = softmax(scores.masked_fill(~visible, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values


def no_mask(*_: Any, **__: Any) -> None:
    """The segments say everything; no mask tensor is built."""


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, no_mask)
