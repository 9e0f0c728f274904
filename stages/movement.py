"""Whether a step moves the weights at all: the share of sampled weights whose stored value it changed.

A learning rate too small for the weights' precision (bfloat16 weights above all) leaves most of them where
they are, and no other metric shows it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.parallel import World

SAMPLED_PER_TENSOR = 4096


class Movement:
    """A few evenly spaced weights of each trained tensor, before and after a step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch `parameters`; of a sharded one, each rank watches its own part."""
        self._parameters = parameters
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Note the sampled weights before a step."""
        self._before = self._sampled()

    @torch.no_grad()
    def share(self, world: World) -> float:
        """Share of the sampled weights, over all ranks, that changed since `remember`."""
        now = self._sampled()
        device = self._parameters[0].device
        changed = torch.zeros((), dtype=torch.float64, device=device)
        for old, new in zip(self._before, now, strict=True):
            changed += (old != new).sum()
        total = float(sum(values.numel() for values in now))
        changed, total = world.sum_(torch.stack([changed, changed.new_tensor(total)])).tolist()
        return changed / max(total, 1.0)

    @torch.no_grad()
    def _sampled(self) -> list[Tensor]:
        local = [_local(parameter.detach()).flatten() for parameter in self._parameters]
        return [values[:: -(-len(values) // SAMPLED_PER_TENSOR) or 1].clone() for values in local]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
