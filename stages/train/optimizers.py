"""The optimizer of a training run, by the name and the fields of `train`.

`adamw` is torch's fused AdamW on float32 masters. The others keep less beside each weight; what that
costs is in docs/memory.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.settings.train import TrainSettings

# Bytes of state that each optimizer keeps for a trained weight.
STATE_BYTES = {
    "adamw": 8.0,
    "adamw_bf16": 4.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "adafactor": 0.0,
    "rmsprop": 4.0,
    "sgd": 0.0,
}
NEEDS_BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit")
# bitsandbytes has no state for sharded tensors; the norms of torch's Adafactor fail on them (torch 2.13).
NOT_SHARDED = (*NEEDS_BITSANDBYTES, "adafactor")


def make_optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer over the parameters that are trained; weight decay acts on matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return _make(settings)([group for group in groups if group["params"]])


def _make(settings: TrainSettings) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    name = settings.optimizer
    adam = {"lr": 0.0, "betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    if name in NEEDS_BITSANDBYTES:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

        cls = AdamW8bit if name == "adamw_8bit" else PagedAdamW8bit
        return lambda groups: cls(groups, **adam)
    return {
        "adamw": lambda groups: torch.optim.AdamW(groups, **adam, fused=True),
        "adamw_bf16": lambda groups: AdamWBf16(groups, **adam, seed=settings.seed),
        "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.0),
        "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.0),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0),
    }[name]


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
                    self._update(parameter, group, number)

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        weight, gradient, *moments = (
            _local(value) for value in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        )
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


def _local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with the probability of the part that is cut off."""
    noise = torch.randint(
        0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator
    )
    return ((exact.view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()
