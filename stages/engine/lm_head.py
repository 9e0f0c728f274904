"""Log-probs of target tokens from hidden states, without keeping a [tokens, vocabulary] tensor.

Own code because torch's `linear_cross_entropy` returns bf16 log-probs under bf16 (6e-2 nats a token)
and its automatic chunk is 8-50 times too small. Here log-sum-exp and the result are always float32.
Logits are kept for the backward pass while they fit `KEPT_LOGITS_BYTES`, else recomputed in chunks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT_LOGITS_BYTES = 1 << 30
CHUNK_TOKENS = 512


class TokenLogps(torch.autograd.Function):
    """log softmax(softcap(scale * hidden @ weight.T + bias))[target], one value a token, in nats."""

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
        """hidden (tokens, width), weight (vocabulary, width), targets (tokens,) -> float32 (tokens,).

        The matmuls run in `hidden`'s dtype; a float32 master `weight` gets its gradient in float32.
        """
        cast = weight.to(hidden.dtype)
        keep = len(targets) * weight.shape[0] * hidden.element_size() <= KEPT_LOGITS_BYTES and any(
            ctx.needs_input_grad
        )
        kept, logsumexps, logps = [], [], []
        for rows in _chunks(len(targets)):
            logits = _logits(hidden[rows], cast, bias, scale, softcap)
            lse = torch.logsumexp(logits.float(), dim=-1)
            logsumexps.append(lse)
            logps.append(logits.gather(1, targets[rows, None])[:, 0].float() - lse)
            if keep:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, cast, bias, targets, *logsumexps, *kept)
        ctx.scale, ctx.softcap, ctx.num_kept = scale, softcap, len(kept)
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """d logp_t / d logits = onehot(target) - softmax, folded back through softcap and scale."""
        hidden, weight, cast, bias, targets, *rest = ctx.saved_tensors
        chunks = _chunks(len(targets))
        logsumexps, kept = rest[: len(chunks)], rest[len(chunks) :]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for index, rows in enumerate(chunks):
            logits = (
                kept[index] if ctx.num_kept else _logits(hidden[rows], cast, bias, ctx.scale, ctx.softcap)
            )
            slope = _slope(logits, logsumexps[index], targets[rows], grad[rows], ctx.scale, ctx.softcap)
            slope = slope.to(hidden.dtype)
            torch.mm(slope, cast, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, slope.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _slope(
    logits: Tensor, logsumexps: Tensor, targets: Tensor, grad: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Gradient of the log-probs with respect to the matmul's result, float32: as few passes as can be."""
    slope = (logits.float() - logsumexps[:, None]).exp_().mul_(-grad[:, None])
    slope.scatter_add_(1, targets[:, None], grad[:, None])
    if softcap is not None:
        slope *= 1 - (logits.float() / softcap) ** 2
    return slope.mul_(scale) if scale != 1.0 else slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in float32; without a product of its own where the types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def collision_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """log sum_v pi(v)^2 at each token, float32, without gradient: what WPO normalises by."""
    values = []
    with torch.no_grad():
        for rows in _chunks(len(hidden)):
            logits = _logits(hidden[rows], weight, bias, scale, softcap).float()
            values.append(torch.logsumexp(2 * logits, dim=-1) - 2 * torch.logsumexp(logits, dim=-1))
    return torch.cat(values) if values else hidden.new_zeros(0, dtype=torch.float32)


def _chunks(tokens: int) -> list[slice]:
    """Chunks of nearly equal size: a matmul of a few rows would round differently from a larger one."""
    count = -(-tokens // CHUNK_TOKENS)
    return [slice(tokens * index // count, tokens * (index + 1) // count) for index in range(count)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = torch.nn.functional.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
