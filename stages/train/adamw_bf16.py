"""AdamW whose two moments take 4 bytes for each weight instead of 8."""

from typing import Any

import torch
from torch import Tensor

from stages.runtime.distributed import local_part


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 1711.05101) on float32 weights, with both moments kept in bfloat16.

    bfloat16 has 8 bits of mantissa: with beta2 = 0.999 a second moment moves by less than half a unit in
    its last place and, rounded to nearest, never would. So moments are rounded up or down at random, in
    proportion (Gupta et al., 1502.02551): right on average, and a function of (seed, step, parameter) alone,
    so a resumed run rounds as the uninterrupted one.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, number)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        weight, gradient = local_part(parameter), local_part(gradient)
        moments = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        generator = torch.Generator(weight.device).manual_seed(
            ((self.seed * 1_000_003 + step) * 1_000_003 + number) % (1 << 63)
        )
        first = moments[0].float().lerp_(gradient, 1 - beta1)
        second = moments[1].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))
        for moment, exact in zip(moments, (first, second), strict=True):
            moment.copy_(_round_stochastically(exact, generator))


def _round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with the probability of the part that is cut off."""
    noise = torch.randint(
        0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator
    )
    return ((exact.view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()
