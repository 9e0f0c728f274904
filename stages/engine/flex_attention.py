"""Attention of a pack on a GPU: `flex_attention` with a block mask, compiled once for a fixed pack length.

In: query, key and value of a pack, and its block masks.  Out: attention with the same visibility as in
`stages/engine/tree_attention.py`: a token sees the tokens of its own row up to itself. What follows a token in its rows is
one stretch of positions, so a key is seen from its own position up to the end of this stretch. Blocks of 128 x 128
positions without a visible pair are skipped. On a CPU it runs uncompiled
and without a backward pass, which is enough to test the mask.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from stages.engine.prefix_tree import TreeIndex
from stages.engine.tree_attention import chunk_of, no_mask

NAME = "align_flex"
BLOCK = 128


class BlockMasks:
    """The block masks of one pack, one for each window and chunk of the model's layers; each is made on first use."""

    def __init__(self, tree: TreeIndex, device: torch.device) -> None:
        """Note for each position of the pack its place in its row, and the end of the positions that see it."""
        self._index = [  # (positions,) each
            torch.from_numpy(values.astype(np.int32)).to(device) for values in (tree.places, tree.ends)
        ]
        self._made: dict[tuple[int | None, int | None], BlockMask] = {}

    def of(self, window: int | None, chunk: int | None) -> BlockMask:
        """The mask of layers that attend to the last `window` positions of a row, within its blocks of `chunk`; None: any."""
        if (window, chunk) not in self._made:
            self._made[window, chunk] = self._make(window, chunk)
        return self._made[window, chunk]

    def _make(self, window: int | None, chunk: int | None) -> BlockMask:
        places, ends = self._index
        length, device = len(places), places.device

        # A function of two small tensors, so that no mask of shape (positions, positions) is made.
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (query < ends[key])
            if window is not None:
                seen = seen & (places[query] - places[key] < window)
            return seen if chunk is None else seen & (places[query] // chunk == places[key] // chunk)

        on_gpu = device.type == "cuda"
        return create_block_mask(visible, None, None, length, length, device, BLOCK, _compile=on_gpu)


def flex_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    block_masks: BlockMasks | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a pack: query (1, heads, positions, head_dim) -> (1, positions, heads, value_dim).

    `key` is (1, key/value heads, positions, head_dim), `value` (1, key/value heads, positions, value_dim), `s_aux` the
    sinks, (heads,).
    """
    assert block_masks is not None, "the model does not pass its keyword arguments on to its attention"
    result, found = _flex(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcapped(softcap),
        block_mask=block_masks.of(sliding_window, chunk_of(module)),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if s_aux is not None:  # a place of score s and no value: the share of the others is e^lse / (e^lse + e^s)
        result = result * torch.sigmoid(found.lse - s_aux[:, None])[..., None].to(result.dtype)
    return result.transpose(1, 2).contiguous(), None


@cache
def _flex(device: str) -> Any:
    """`flex_attention`, compiled on a GPU."""
    # For fixed shapes: every pack is filled up to the token budget, so there is one shape.
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


@cache
def _softcapped(softcap: float) -> Any:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return score_mod


# In compiled layers it runs as it is written, and what it compiles itself stays compiled.
AttentionInterface.register(NAME, torch.compiler.disable(flex_forward))
AttentionMaskInterface.register(NAME, no_mask)
