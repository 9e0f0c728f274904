"""What an optimizer step does to the stored weights: how many change, how many cannot, how many are not finite.

In: the trained parameters, before and after a step.  Out: the metrics `weights_...`. A learning rate too small for the
precision of the weights (above all with bfloat16 weights) leaves most of them unchanged, and no other metric shows this.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.runtime.distributed import World, local_part

SAMPLED_PER_TENSOR = 4096


class WeightUpdates:
    """Compares a few evenly spaced weights of each trained tensor before and after a step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Compare weights of `parameters`; of a sharded one, each rank compares its own part."""
        self._parameters = parameters
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Copy the compared weights before a step, and note which of them have a gradient other than 0."""
        # Weights without a gradient (embeddings of tokens that do not occur) are left out: they never change, and with a
        # large vocabulary they would be the majority.
        self._before = [
            (_sampled(parameter).clone(), _sampled(parameter.grad) != 0)
            for parameter in self._parameters
            if parameter.grad is not None
        ]

    @torch.no_grad()
    def shares(self, world: World, rate: float) -> dict[str, float]:
        """Shares of the compared weights over all ranks, by metric name; `rate` is the learning rate of the step.

        Of the finite weights with a gradient: those changed since `before_step`, and those so coarsely stored that a
        change of `rate` is rounded away. Of all: those that are infinite or NaN. A share of no weight is 0.
        """
        # Integers are exact beyond 2^24 weights, and Apple's GPU has no float64.
        counts = torch.zeros(5, dtype=torch.int64, device=self._parameters[0].device)
        updated = [parameter for parameter in self._parameters if parameter.grad is not None]
        for (old, has_gradient), parameter in zip(self._before, updated, strict=True):
            new = _sampled(parameter)
            finite = new.isfinite()
            compared = finite & has_gradient
            coarse = old.abs() + rate == old.abs()
            found = [(new != old) & compared, coarse & compared, compared, ~finite, torch.ones_like(finite)]
            counts += torch.stack([part.sum() for part in found])
        changed, coarse, compared, nonfinite, total = world.sum_(counts).tolist()
        return {
            "weights_changed": changed / max(compared, 1),
            "weights_too_coarse": coarse / max(compared, 1),
            "weights_nonfinite": nonfinite / max(total, 1),
        }


def _sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor, or of this rank's part of a sharded one."""
    values = local_part(tensor).detach().flatten()
    return values[:: -(-len(values) // SAMPLED_PER_TENSOR) or 1]
