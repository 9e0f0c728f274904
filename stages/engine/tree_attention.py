"""Attention of a pack along its tree, registered with transformers' attention interface.

In: query, key and value of a pack, and its runs.  Out: attention in which a token sees the tokens of its own row up to
itself, without a mask over the pack. A run is one call, or a few for a long one, over the keys of its row. Going through
the runs in order, the keys of a row are gathered by writing each run once, over those of the row before it.

The gradient goes through the nodes: a node attends to itself causally, and what follows it, one stretch of
positions, sees all of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from stages.engine.attention_calls import NodeCall, RowCall, Rules, node_calls, row_calls
from stages.engine.attention_kernels import Attended, Flash, Kernel, Matmul
from stages.engine.prefix_tree import Run, TreeIndex
from stages.engine.shapes_alone import of_shapes, one_of_each

NAME = "align_tree"


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
        for call, keys, values, mask in _gathered(key, value, tree, rules):
            _put(result, logsumexp, call, *kernel.forward(_filled_queries(query, call), keys, values, mask))
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
        found = [torch.empty_like(side) for side in (query, key, value)]
        for call, mask in _masked_nodes(ctx.tree, ctx.rules, query, kernel):
            seen = Attended(*(_part(side, call.queries) for side in (query, result, logsumexp, gradient)))
            sides = _part(key, call.keys), _part(value, call.keys)
            _add(found, call, kernel.backward(seen, *sides, mask, call.causal))
        of_sinks = None
        if sinks is not None:
            shares = torch.exp(sinks.float()[:, None] - logsumexp)
            of_sinks = -(shares * (gradient * result).float().sum(-1)).sum((0, 2)).to(sinks.dtype)
        return *found, of_sinks, None, None


def _kernel(query: Tensor, rules: Rules) -> Kernel:
    fused = query.device.type == "cpu" and rules.softcap is None
    return Flash(rules.scaling) if fused else Matmul(rules.scaling, rules.softcap)


def _filled_queries(query: Tensor, call: RowCall) -> Tensor:
    """The queries of a call; zeros behind the last position of the pack."""
    found = query.narrow(2, call.start, min(call.filled, query.shape[2] - call.start))
    missing = call.filled - found.shape[2]
    return pad(found, (0, 0, 0, missing)) if missing else found


def _put(result: Tensor, logsumexp: Tensor, call: RowCall, found: Tensor, sums: Tensor) -> None:
    """Put in what queries found, in place; if they have seen keys before, to be shared with what they found there."""
    found, sums = found.narrow(2, 0, call.number), sums.narrow(2, 0, call.number)
    result, logsumexp = (side.narrow(2, call.start, call.number) for side in (result, logsumexp))
    if call.is_first:
        result.copy_(found)
        logsumexp.copy_(sums)
        return
    total = torch.logaddexp(logsumexp, sums)
    result.mul_((logsumexp - total).exp_()[..., None]).addcmul_(found, (sums - total).exp_()[..., None])
    logsumexp.copy_(total)


def _add(gradients: Sequence[Tensor], call: NodeCall, parts: Sequence[Tensor]) -> None:
    """Add the gradients of query, key and value that a call found, in place; `gradients` are not set before the first."""
    for side, places, part in zip(gradients, (call.queries, call.keys, call.keys), parts, strict=True):
        own = _part(side, places)
        own.copy_(part) if call.is_first else own.add_(part)


def _gathered(
    key: Tensor, value: Tensor, tree: TreeIndex, rules: Rules
) -> Iterator[tuple[RowCall, Tensor, Tensor, Tensor | None]]:
    """The forward calls, each with the keys and values of its row, and the mask (filled, keys): 0 where seen, else -inf."""
    # Tensors of shapes alone (`align plan`) have no rounding.
    alone = of_shapes(key)
    runs, longest, block, fewest = row_calls(tree, rules, key.device.type == "cpu" and not alone)
    places = torch.arange(longest + fewest, device=key.device)
    # Without chunks a mask is a function of distances: that of the last block of the longest row has in it those of all.
    last = None if rules.chunk else rules.mask(places[longest - block :], places[:longest]).to(key.dtype)
    row_key, row_value = (side.new_zeros(*side.shape[:2], longest, side.shape[3]) for side in (key, value))
    for run, calls in _one_of_each_call(runs) if alone else runs:
        row_key.narrow(2, run.place, run.length).copy_(key.narrow(2, run.start, run.length))
        row_value.narrow(2, run.place, run.length).copy_(value.narrow(2, run.start, run.length))
        for call in calls:
            mask, begin = None, call.place // block * block
            if call.masked and last is None:
                mask = rules.mask(places[call.place :][: call.filled], places[call.keys]).to(key.dtype)
            elif call.masked and last is not None:
                shift, first = longest - block - begin, call.place - begin
                mask = last[first : first + call.filled, call.keys.start + shift : call.keys.stop + shift]
            yield call, _part(row_key, call.keys), _part(row_value, call.keys), mask


def _masked_nodes(
    tree: TreeIndex, rules: Rules, query: Tensor, kernel: Kernel
) -> Iterator[tuple[NodeCall, Tensor | None]]:
    """The backward calls, each with its mask."""
    places = torch.from_numpy(tree.places).to(query.device) if rules.limited else None
    calls = node_calls(tree, rules, not isinstance(kernel, Matmul))
    for call in one_of_each(calls, lambda call: call.shape) if of_shapes(query) else calls:
        mask = None
        if places is not None and call.masked:
            mask = rules.mask(places[call.queries], places[call.keys]).to(query.dtype)
        yield call, mask


def _part(side: Tensor, places: slice) -> Tensor:
    return side.narrow(2, places.start, places.stop - places.start)


def _one_of_each_call(runs: Sequence[tuple[Run, Sequence[RowCall]]]) -> list[tuple[Run, Sequence[RowCall]]]:
    calls = one_of_each(((run, call) for run, calls in runs for call in calls), lambda pair: pair[1].shape)
    return [(run, [call]) for run, call in calls]


def no_mask(*_: Any, **__: Any) -> None:
    """No mask tensor is built: the runs hold the same information."""
    # Needed: under a mask function of transformers' own, restarting positions are read as separate sequences, and the
    # second completion of an example would not see its prompt.


# In compiled layers it runs as it is written: its calls depend on the pack.
AttentionInterface.register(NAME, torch.compiler.disable(tree_attention))
AttentionMaskInterface.register(NAME, no_mask)
