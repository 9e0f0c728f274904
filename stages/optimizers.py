"""The optimizer of a training run, by the name and the fields of `train`."""

import torch

from stages.settings import TrainSettings


def make_optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; weight decay acts on matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=betas,
        eps=settings.adam_epsilon,
        fused=True,
    )
