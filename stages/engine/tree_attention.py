"""Attention of a pack along its tree, registered with transformers' attention interface.

In: query, key and value of a pack, and its runs.  Out: attention in which a token sees the tokens of its own row up to
itself, without a mask over the pack. A run is one call, or a few for a long one, over the keys of its row. Going through
the runs in order, the keys of a row are gathered by writing each run once, over those of the row before it.

The gradient goes through the nodes: a node attends to itself causally, and what follows it, one stretch of
positions, sees all of it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from stages.engine.attention_kernels import Attended, Flash, Kernel, Matmul
from stages.engine.prefix_tree import TreeIndex

NAME = "align_tree"
# On a CPU, queries of one block of this many places of a row share a call, over the keys up to the end of their block,
# and the number of queries of a call is a multiple of `FEWEST`. The ends of matrix products round otherwise; so the
# float32 result of a token depends on its own row alone, to the bit, whatever rows are in its pack.
BLOCK = 64
FEWEST = 16
# Of so many keys at the multiples of this number, all queries that see them share a call, whatever rows they are in.
MANY_KEYS = 512
# Elsewhere: queries of a call.
LARGE_BLOCK = 512


@dataclass(frozen=True)
class Rules:
    """How a layer attends within a row.

    `scaling`: factor of the scores. `window`: the last places that a query sees. `chunk`: the length of blocks of the row
    that do not see each other. `softcap`: bound of the scores.
    """

    scaling: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None

    def all_visible(self, total: int) -> bool:
        """Whether a query of a row of `total` places sees every place up to its own."""
        return all(length is None or length >= total for length in (self.window, self.chunk))

    def first_key(self, query: int) -> int:
        """The first place that a query at this place sees."""
        behind_window = 0 if self.window is None else query - self.window + 1
        return max(0, behind_window, 0 if self.chunk is None else query // self.chunk * self.chunk)

    def last_query(self, key: int) -> int:
        """The last place that sees a key at this place."""
        of_window = sys.maxsize if self.window is None else key + self.window - 1
        of_chunk = sys.maxsize if self.chunk is None else (key // self.chunk + 1) * self.chunk - 1
        return min(of_window, of_chunk)

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What queries see of keys at these places of their row: (queries, keys) float32, 0 or -inf."""
        distance = queries[:, None] - keys
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.chunk is not None:
            seen &= queries[:, None] // self.chunk == keys // self.chunk
        return torch.zeros(seen.shape, device=keys.device).masked_fill_(~seen, float("-inf"))


def chunk_of(module: Any) -> int | None:
    """The length of the blocks that a layer attends within (Llama 4), which transformers has in the mask alone."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if config is None or kinds is None or layer is None or kinds[layer] != "chunked_attention":
        return None
    return config.attention_chunk_size


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeIndex | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a pack: query (1, heads, positions, head_dim) -> (1, positions, heads, value_dim).

    `key` is (1, key/value heads, positions, head_dim), `value` (1, key/value heads, positions, value_dim), `s_aux` the
    sinks, (heads,): the score of a place that takes part in the softmax and has no value.
    """
    assert tree is not None, "the model does not pass its keyword arguments on to its attention"
    dtype, width, value_width = query.dtype, query.shape[-1], value.shape[-1]
    if query.device.type == "cpu":
        # On a CPU, torch's backward pass in bfloat16 takes 2 to 4 times as long as in float32 below 128 tokens and is
        # no faster above, so autocast would cost both time and precision here.
        query, key, value = query.float(), key.float(), value.float()
    rules = Rules(scaling or width**-0.5, sliding_window, chunk_of(module), softcap)
    if width != value_width:  # zeros change neither scores nor values
        query, key, value = (
            pad(side, (0, max(width, value_width) - side.shape[-1])) for side in (query, key, value)
        )
    with torch.autocast(query.device.type, enabled=False):
        result = TreeAttention.apply(query, key, value, s_aux, tree, rules)
    return result[..., :value_width].transpose(1, 2).to(dtype).contiguous(), None


class TreeAttention(torch.autograd.Function):
    """Attention along the runs of a pack; saves its inputs and its result, and no keys gathered for a row."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        tree: TreeIndex,
        rules: Rules,
    ) -> Tensor:
        """query (1, heads, positions, head_dim), key and value (1, key/value heads, ...), sinks (heads,) -> like query."""
        kernel = _kernel(query, rules)
        result = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
            1, 2
        )
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        for part in _calls(key, value, tree, rules):
            own = slice(part.start, part.start + part.length)
            queries = query[:, :, part.start : part.start + part.filled]
            queries = pad(queries, (0, 0, 0, part.filled - queries.shape[2]))
            found, sums = kernel.forward(queries, part.key, part.value, part.mask)
            found, sums = found[:, :, : part.length], sums[:, :, : part.length]
            if part.is_first:
                result[:, :, own], logsumexp[:, :, own] = found, sums
            else:
                _merge(result[:, :, own], logsumexp[:, :, own], found, sums)
        if sinks is not None:  # the share of the others is e^logsumexp / (e^logsumexp + e^sink)
            total = torch.logaddexp(logsumexp, sinks.float()[:, None])
            result *= torch.exp(logsumexp - total)[..., None]
            logsumexp = total
        ctx.save_for_backward(query, key, value, result, logsumexp, sinks)
        ctx.tree, ctx.rules = tree, rules
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of query, key, value and sinks."""
        query, key, value, result, logsumexp, sinks = ctx.saved_tensors
        kernel = _kernel(query, ctx.rules)
        of_query, of_key, of_value = (torch.zeros_like(side) for side in (query, key, value))
        for keys, queries, mask, causal in _node_calls(ctx.tree, ctx.rules, query, kernel):
            seen = Attended(*(side[:, :, queries] for side in (query, result, logsumexp, gradient)))
            found = kernel.backward(seen, key[:, :, keys], value[:, :, keys], mask, causal)
            of_query[:, :, queries] += found[0]
            of_key[:, :, keys] += found[1]
            of_value[:, :, keys] += found[2]
        of_sinks = None
        if sinks is not None:
            shares = torch.exp(sinks.float()[:, None] - logsumexp)
            of_sinks = -(shares * (gradient * result).float().sum(-1)).sum((0, 2)).to(sinks.dtype)
        return of_query, of_key, of_value, of_sinks, None, None


class _Call(NamedTuple):
    """`length` queries from position `start` on, filled up to `filled`, and the keys and values that they see of a row.

    `is_first`: whether these queries saw no keys before. `mask` (filled, keys): 0 where a query sees a key, else -inf.
    """

    start: int
    length: int
    filled: int
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_first: bool


def _kernel(query: Tensor, rules: Rules) -> Kernel:
    fused = query.device.type == "cpu" and rules.softcap is None
    return Flash(rules.scaling) if fused else Matmul(rules.scaling, rules.softcap)


def _merge(result: Tensor, logsumexp: Tensor, found: Tensor, sums: Tensor) -> None:
    """Add what queries found among further keys, in place."""
    total = torch.logaddexp(logsumexp, sums)
    result.mul_((logsumexp - total).exp_()[..., None]).addcmul_(found, (sums - total).exp_()[..., None])
    logsumexp.copy_(total)


def _calls(key: Tensor, value: Tensor, tree: TreeIndex, rules: Rules) -> Iterator[_Call]:
    """The attention calls over the rows of a pack."""
    # Tensors of shapes alone (`align plan`) have no rounding, and each call takes a millisecond of Python.
    on_cpu = key.device.type == "cpu" and not isinstance(key, FakeTensor)
    block, fewest = (BLOCK, FEWEST) if on_cpu else (LARGE_BLOCK, 1)
    limited = rules.window is not None or rules.chunk is not None
    longest = -(-tree.longest // block) * block
    many = longest if limited else MANY_KEYS
    places = torch.arange(longest + fewest, device=key.device)
    # Without chunks a mask is a function of distances: that of the last block of the longest row has in it those of all.
    last = None if rules.chunk else rules.mask(places[longest - block :], places[:longest]).to(key.dtype)
    row_key, row_value = (side.new_zeros(*side.shape[:2], longest, side.shape[3]) for side in (key, value))
    for run in tree.runs:
        own, row = slice(run.start, run.start + run.length), slice(run.place, run.place + run.length)
        row_key[:, :, row], row_value[:, :, row] = key[:, :, own], value[:, :, own]
        for begin in range(run.place // many * many, row.stop - many + 1, many):
            start = run.start + begin + many - run.place
            if number := tree.ends[start - 1] - start:
                keys = slice(begin, begin + many)
                filled = -(-number // fewest) * fewest
                yield _Call(
                    start, number, filled, row_key[:, :, keys], row_value[:, :, keys], None, not begin
                )
        for place in _cut(row, block):
            begin = place.start // block * block
            from_ = max(rules.first_key(begin), begin // many * many)
            seen = slice(from_, begin + block if on_cpu else place.stop)
            number = place.stop - place.start
            filled = -(-number // fewest) * fewest
            if last is None:
                mask = rules.mask(places[place.start :][:filled], places[seen]).to(key.dtype)
            else:
                shift = longest - block - begin
                mask = last[place.start - begin :][:filled, seen.start + shift : seen.stop + shift]
            start = run.start + place.start - run.place
            yield _Call(
                start,
                number,
                filled,
                row_key[:, :, seen],
                row_value[:, :, seen],
                mask,
                limited or begin < many,
            )


def _cut(row: slice, block: int) -> Iterator[slice]:
    """Places of a row, cut at the multiples of `block`."""
    start = row.start
    while start < row.stop:
        stop = min(row.stop, (start // block + 1) * block)
        yield slice(start, stop)
        start = stop


def _node_calls(
    tree: TreeIndex, rules: Rules, query: Tensor, kernel: Kernel
) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
    """Keys, queries that may see them, the mask between them, if any, and whether query n sees keys up to n."""
    places = torch.from_numpy(tree.places).to(query.device)
    limited = rules.window is not None or rules.chunk is not None
    most = LARGE_BLOCK if limited or isinstance(kernel, Matmul) else tree.size
    for node in tree.nodes:
        for start in range(node.start, node.start + node.length, most):
            end = min(start + most, node.start + node.length)
            keys, plain = slice(start, end), rules.all_visible(end - start)
            yield keys, keys, None if plain else rules.mask(places[keys], places[keys]).to(query.dtype), plain
            seeing = np.flatnonzero(
                tree.places[end : node.end] <= rules.last_query(int(tree.places[end - 1]))
            )
            if len(seeing):
                for first in range(end + seeing[0], end + seeing[-1] + 1, most):
                    queries = slice(first, min(first + most, end + seeing[-1] + 1))
                    mask = rules.mask(places[queries], places[keys]).to(query.dtype) if limited else None
                    yield keys, queries, mask, False


def no_mask(*_: Any, **__: Any) -> None:
    """No mask tensor is built: the runs hold the same information."""
    # Needed: under a mask function of transformers' own, restarting positions are read as separate sequences, and the
    # second completion of an example would not see its prompt.


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, no_mask)
