"""A candidate for GPUs: torch's varlen attention with gathered keys, which is exact sharing of what rows begin with.

Each run of the tree is a sequence of queries of its own; its keys are those of its row, gathered. The mask is causal from the lower right, so it needs bfloat16 and a FlashAttention kernel;
on a CPU the same gathering runs through plain attention, sequence by sequence, to check it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from stages.engine.prefix_tree import TreeIndex
from stages.engine.tree_attention import no_mask

NAME = "align_varlen"


def gathered(tree: TreeIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the keys of every sequence, and the cumulative lengths of queries and of keys."""
    row_at = np.zeros(tree.longest, np.int64)
    keys = []
    for run in tree.runs:
        row_at[run.place : run.place + run.length] = run.start + np.arange(run.length)
        keys.append(row_at[: run.place + run.length].copy())
    queries = [run.length for run in tree.runs]
    return np.concatenate(keys), np.cumsum([0, *queries]), np.cumsum([0, *map(len, keys)])


def varlen_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeIndex,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a pack: query (1, heads, positions, dim) -> (1, positions, heads, dim)."""
    index, query_ends, key_ends = gathered(tree)
    picked = torch.from_numpy(index).to(key.device)
    queries = query[0].transpose(0, 1).contiguous()
    keys, values = (side[0].transpose(0, 1)[picked] for side in (key, value))
    if query.device.type == "cpu":
        return _one_by_one(queries, keys, values, query_ends, key_ends, scaling)[None], None
    from torch.nn.attention.varlen import varlen_attn

    ends = [torch.from_numpy(side).to(key.device, torch.int32) for side in (query_ends, key_ends)]
    longest = [int(np.diff(side).max()) for side in (query_ends, key_ends)]
    grouped = query.shape[1] != key.shape[1]
    result = varlen_attn(
        queries, keys, values, *ends, *longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )
    assert isinstance(result, Tensor)
    return result[None], None


def _one_by_one(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_ends: np.ndarray,
    key_ends: np.ndarray,
    scaling: float | None,
) -> Tensor:
    """What the kernel computes, by plain attention."""
    results = []
    for number in range(len(query_ends) - 1):
        q = queries[query_ends[number] : query_ends[number + 1]].transpose(0, 1)
        k, v = (side[key_ends[number] : key_ends[number + 1]].transpose(0, 1) for side in (keys, values))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        attend = torch.nn.functional.scaled_dot_product_attention
        results.append(attend(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(0, 1))
    return torch.cat(results)


AttentionInterface.register(NAME, varlen_forward)
AttentionMaskInterface.register(NAME, no_mask)
