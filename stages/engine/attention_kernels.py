"""Attention of some queries over some keys, and its gradient, in two ways with one interface.

In: query (1, heads, queries, head_dim), key and value (1, key/value heads, keys, head_dim).  Out: the result, (1, heads,
queries, head_dim), and the log-sum-exp of the scores of each query, (1, heads, queries) float32. With the result and the
log-sum-exp over *all* keys that a query sees, the gradient of some of its keys does not need the others
(FlashAttention, 2205.14135, appendix B.4).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Attended(NamedTuple):
    """Queries with the result, its gradient and the log-sum-exp over all keys that they see."""

    query: Tensor
    result: Tensor
    logsumexp: Tensor
    gradient: Tensor


class Kernel(Protocol):
    """`mask` (queries, keys): 0 where a query sees a key, else -inf; None: all. `causal`: query n sees keys up to n."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Result and log-sum-exp."""
        ...

    def backward(
        self, queries: Attended, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        ...


@dataclass(frozen=True)
class Flash:
    """torch's fused attention on a CPU, below `scaled_dot_product_attention`, which does not give the log-sum-exp."""

    scale: float

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=self.scale
        )

    def backward(
        self, queries: Attended, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel.backward`."""
        query, result, logsumexp, gradient = queries
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, result, logsumexp, 0.0, causal, attn_mask=mask, scale=self.scale
        )


@dataclass(frozen=True)
class Matmul:
    """By two matrix products, on any device, with scores `softcap * tanh(score / softcap)` where there is a softcap."""

    scale: float
    softcap: float | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        scores = self._scores(query, key)
        scores = scores if mask is None else scores + mask
        logsumexp = scores.logsumexp(-1)  # (1, key/value heads, group, queries)
        weights = (scores - logsumexp[..., None]).exp_().to(value.dtype)
        return (weights @ value[:, :, None]).reshape(query.shape), logsumexp.reshape(query.shape[:3])

    def backward(
        self, queries: Attended, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel.backward`."""
        query, result, logsumexp, gradient = (self._grouped(side, key) for side in queries)
        scores = self._scores(queries.query, key)
        logps = scores - logsumexp[..., None]
        if causal:
            mask = logps.new_full(logps.shape[-2:], float("-inf")).triu_(1)
        weights = (logps if mask is None else logps + mask).exp_()
        delta = (gradient.float() * result.float()).sum(-1, keepdim=True)
        slopes = (gradient @ value[:, :, None].transpose(-1, -2)).float().sub_(delta).mul_(weights)
        if self.softcap is not None:
            slopes *= 1 - (scores / self.softcap) ** 2
        slopes = slopes.mul_(self.scale).to(key.dtype)
        return (
            (slopes @ key[:, :, None]).reshape(queries.query.shape),
            (slopes.transpose(-1, -2) @ query).sum(2),
            (weights.to(value.dtype).transpose(-1, -2) @ gradient).sum(2),
        )

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(1, key/value heads, group, queries, keys), float32."""
        scores = (self._grouped(query, key) @ key[:, :, None].transpose(-1, -2)).float() * self.scale
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    @staticmethod
    def _grouped(side: Tensor, key: Tensor) -> Tensor:
        """Heads by the key/value head that they share: (1, heads, ...) -> (1, key/value heads, group, ...)."""
        return side.unflatten(1, (key.shape[1], -1))
