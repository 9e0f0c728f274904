"""Whether a step moves the weights at all: of those with a gradient, the share whose stored value it changed.

A learning rate too small for the weights' precision (bfloat16 weights above all) leaves most of them where
they are, and no other metric shows it. Weights without a gradient (padding, tokens that did not occur) say
nothing about that and are left out, or a large vocabulary alone would look like a run that stands still.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.runtime.distributed import World, local_part

SAMPLED_PER_TENSOR = 4096


class Movement:
    """A few evenly spaced weights of each trained tensor, before and after a step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch `parameters`; of a sharded one, each rank watches its own part."""
        self._parameters = parameters
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Note the sampled weights before a step, and which of them have a gradient that is not 0."""
        self._before = [
            (_sampled(parameter).clone(), _sampled(parameter.grad) != 0)
            for parameter in self._parameters
            if parameter.grad is not None
        ]

    @torch.no_grad()
    def share(self, world: World) -> float:
        """Share of these that changed since `remember`, over all ranks; 0 when none had a gradient."""
        counts = torch.zeros(2, dtype=torch.float64, device=self._parameters[0].device)
        moved = [parameter for parameter in self._parameters if parameter.grad is not None]
        for (old, pushed), parameter in zip(self._before, moved, strict=True):
            counts += torch.stack([((_sampled(parameter) != old) & pushed).sum(), pushed.sum()])
        changed, total = world.sum_(counts).tolist()
        return changed / max(total, 1.0)


def _sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor, or of this rank's part of a sharded one."""
    values = local_part(tensor).detach().flatten()
    return values[:: -(-len(values) // SAMPLED_PER_TENSOR) or 1]
