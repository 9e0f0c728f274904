"""Exponentials and log-odds of log-probs that are finite in float32, and whose gradients are neither infinite nor 0.

The log-ratio of a long completion reaches hundreds of nats, and exp(89) is infinite in float32. Clipping the exponent
would make the value finite and the gradient 0, so such a completion would never be pulled back.
"""

import math

import torch
from torch import Tensor

# Beyond this exponent exp is continued by its tangent. Up to 10,000 nats values, squares and gradients stay below 1e30,
# and a logistic function of e^20 is saturated anyway.
LARGEST_EXPONENT = 20.0


def expm1(exponents: Tensor) -> Tensor:
    """`e^x - 1` up to x = 20, accurate near 0, and its tangent at 20 beyond: increasing and convex everywhere."""
    below = torch.expm1(exponents.clamp(max=LARGEST_EXPONENT))
    return below + math.exp(LARGEST_EXPONENT) * (exponents - LARGEST_EXPONENT).clamp(min=0)


def log_odds(logps: Tensor) -> Tensor:
    """`log(p / (1 - p))` from log p, accurate for p near 0 and near 1; p = 1 is taken as the nearest number below."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).tiny)
    return logps - torch.log(-torch.expm1(logps))
