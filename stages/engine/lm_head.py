"""Log-probs of target tokens from hidden states: output layer, log-softmax and gather, in chunks of tokens.

In: hidden states, the weight of the output layer (lm_head), targets.  Out: float32 log-probs. Log-sum-exp is computed
in float32 whatever the dtype, and no tensor of shape (tokens, vocabulary) is needed at once.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.engine.shapes_alone import of_shapes, one_of_each

# Logits up to this size are kept for the backward pass; larger ones are recomputed chunk by chunk.
KEPT_LOGITS_BYTES = 1 << 30
CHUNK_TOKENS = 512


# Not torch's `linear_cross_entropy`: under bfloat16 it returns bfloat16 log-probs, off by up to 6e-2 nats a token,
# and the chunks it chooses are 8 to 50 times too small (torch 2.13).
class TokenLogps(torch.autograd.Function):
    """log softmax(softcap(scale * (hidden @ weight.T + bias)))[target], one value per token, in nats."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """hidden (tokens, width), weight (vocabulary, width), bias (vocabulary,), targets (tokens,) -> (tokens,) float32.

        The matmuls run in the dtype of `hidden`; a float32 master `weight` gets its gradient in float32.
        """
        cast = weight.to(hidden.dtype)  # (vocabulary, width)
        keep = len(targets) * weight.shape[0] * hidden.element_size() <= KEPT_LOGITS_BYTES and any(
            ctx.needs_input_grad
        )
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        logsumexps = torch.empty_like(logps)
        kept = []
        for chunk in _chunks(hidden, repeated=keep):
            logits = _logits(hidden[chunk], cast, bias, scale, softcap)  # (chunk, vocabulary)
            lse = torch.logsumexp(logits.float(), dim=-1)  # (chunk,)
            logsumexps[chunk] = lse
            logps[chunk] = logits.gather(1, targets[chunk, None])[:, 0].float() - lse
            if keep:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, cast, bias, targets, logsumexps, *kept)
        ctx.scale, ctx.softcap = scale, softcap
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of hidden, weight and bias from `grad` (tokens,)."""
        hidden, weight, cast, bias, targets, logsumexps, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for index, chunk in enumerate(_chunks(hidden, repeated=bool(kept))):
            logits = (
                kept[index] if kept else _logits(hidden[chunk], cast, bias, ctx.scale, ctx.softcap)
            )  # (chunk, vocabulary)
            grad_logits = _grad_logits(
                logits, logsumexps[chunk], targets[chunk], grad[chunk], ctx.scale, ctx.softcap
            ).to(hidden.dtype)  # (chunk, vocabulary)
            torch.mm(grad_logits, cast, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[chunk])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _grad_logits(
    logits: Tensor, logsumexps: Tensor, targets: Tensor, grad: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Gradient with respect to the result of the matmul, before scale and softcap: (chunk, vocabulary), float32.

    d logp / d logits = onehot(target) - softmax(logits).
    """
    # In place, in as few passes as possible: the tensor is as large as a chunk of logits.
    gradient = (logits.float() - logsumexps[:, None]).exp_().mul_(-grad[:, None])
    gradient.scatter_add_(1, targets[:, None], grad[:, None])
    if softcap is not None:
        gradient *= 1 - (logits.float() / softcap) ** 2
    return gradient.mul_(scale) if scale != 1.0 else gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in the dtype of `total`; without a temporary if the dtypes are equal."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def collision_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """log sum_v pi(v)^2 at each token, (tokens,), float32, without gradient: WPO's normalizer (arXiv 2406.11827)."""
    values = []
    with torch.no_grad():
        for chunk in _chunks(hidden, repeated=True):
            values.append(collisions_of(_logits(hidden[chunk], weight, bias, scale, softcap).float()))
    return torch.cat(values) if values else hidden.new_zeros(0, dtype=torch.float32)


def collisions_of(logits: Tensor) -> Tensor:
    """log sum_v pi(v)^2, the log-probability that two draws are the same token: (tokens, vocabulary) -> (tokens,)."""
    return torch.logsumexp(2 * logits, dim=-1) - 2 * torch.logsumexp(logits, dim=-1)


def _chunks(hidden: Tensor, repeated: bool) -> list[slice]:
    """Slices of nearly equal size over the tokens; of shapes alone all of them only if `repeated`."""
    # Nearly equal, because a matmul of a few rows rounds differently from a larger one.
    tokens = len(hidden)
    count = -(-tokens // CHUNK_TOKENS)
    found = [slice(tokens * index // count, tokens * (index + 1) // count) for index in range(count)]
    # The tensors of the chunk before are alive as those of the next one are made.
    return found if repeated or not of_shapes(hidden) else _neighbours_of_each_size(found)


def _neighbours_of_each_size(chunks: list[slice]) -> list[slice]:
    pairs = one_of_each(
        itertools.pairwise(chunks), lambda pair: tuple(chunk.stop - chunk.start for chunk in pair)
    )
    return [chunk for pair in pairs for chunk in pair] or chunks


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """(tokens, width) -> (tokens, vocabulary), in the dtype of `hidden`."""
    logits = torch.nn.functional.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
