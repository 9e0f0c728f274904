"""Attention of a pack, example by example, registered with transformers' attention interface.

In: query, key and value of a pack, and its segments.  Out: attention in which the prompt of an example attends to
itself causally, each completion to the prompt and to itself, and no example to another. There is no mask over the
pack: the prompt with its first completion is one causal call, each further completion one call over
[prompt | completion].
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
    """Attention over a pack: query (1, heads, positions, head_dim) -> (1, positions, heads, head_dim).

    `key` and `value` are (1, key/value heads, positions, head_dim).
    """
    assert segments is not None, "the model does not pass its keyword arguments on to its attention"
    dtype = query.dtype
    if query.device.type == "cpu":
        # On a CPU, torch's backward pass in bfloat16 takes 2 to 4 times as long as in float32 below 128 tokens and is
        # no faster above, so autocast would cost both time and precision here.
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
    """Attention over a pack: query (1, heads, positions, head_dim) -> the same shape."""
    sizes = [size for segment in segments for size in _call_sizes(segment)]
    # One split costs one concatenation in the backward pass. A slice for each segment would cost a tensor of zeros of
    # the size of the pack each, nearly half of the time of a training step.
    pieces = zip(*(side.split(sizes, dim=2) for side in (query, key, value)), strict=True)
    results = []
    for segment in segments:
        first_query, first_key, first_value = next(pieces)
        results.append(_attend(first_query, first_key, first_value, 0, scaling, sliding_window, softcap))
        before = segment.prompt_length
        for _other in segment.completion_lengths[1:]:
            own_query, own_key, own_value = next(pieces)
            # (1, heads, prompt length + completion length, head_dim)
            keys = torch.cat([first_key[:, :, :before], own_key], dim=2)
            values = torch.cat([first_value[:, :, :before], own_value], dim=2)
            results.append(_attend(own_query, keys, values, before, scaling, sliding_window, softcap))
    return torch.cat(results, dim=2)


def _call_sizes(segment: Segment) -> list[int]:
    """Number of queries of each attention call of an example: prompt and first completion, then each further one."""
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
    """Causal attention of queries at positions `before`, `before` + 1, ... over keys from position 0.

    query (1, heads, length, head_dim), key and value (1, key/value heads, total, head_dim) -> the shape of query.
    """
    length, total = query.shape[2], key.shape[2]
    if not length:  # a completion of one token has no position in the pack
        return query
    reach = total if window is None else min(window, total)
    windowed = reach < total
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and not before and not windowed:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    distances = torch.arange(before, before + length, device=query.device)[:, None] - torch.arange(
        total, device=query.device
    )  # (length, total)
    visible = (distances >= 0) & (distances < reach)
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
    """No mask tensor is built: the segments hold the same information."""
    # Needed: under a mask function of transformers' own, restarting positions are read as separate sequences, and the
    # second completion of an example would not see its prompt.


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, no_mask)
