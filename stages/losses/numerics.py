"""Exponentials and logarithms of log-probs that stay finite, with a slope, where float32 ends.

A log-ratio of a long completion reaches hundreds of nats, and exp of 89 is infinite in float32. A bound on
the exponent would make the value finite and the slope 0, and a row without a slope is never pulled back.
"""

import math

import torch
from torch import Tensor

# Beyond this exponent exp goes on along its tangent: values, their squares and their slopes stay below 1e30 up to
# 10,000 nats, and e^20 is so large that a logistic curve of it is saturated anyway.
LARGEST_EXPONENT = 20.0


def expm1(exponents: Tensor) -> Tensor:
    """`e^x - 1` up to x = 20, exact near 0, and the tangent at 20 beyond: increasing and convex everywhere."""
    curve = torch.expm1(exponents.clamp(max=LARGEST_EXPONENT))
    return curve + math.exp(LARGEST_EXPONENT) * (exponents - LARGEST_EXPONENT).clamp(min=0)


def log_odds(logps: Tensor) -> Tensor:
    """`log(p / (1 - p))` of `log p`, exact near both ends; `p = 1` counts as the nearest number below."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).tiny)
    return logps - torch.log(-torch.expm1(logps))
