"""The step-0 audit: cached reference log-probs against the untouched policy, where both are one model.

A wrong model, template or dtype, or a value that was tampered with, stops the run here, before the
first optimizer step, with the row, the token and the difference.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from cache.errors import CorruptError
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.engine.packs import build_pack

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

NUM_EXAMPLES = 8
# Nats a token. float32 differs by rounding of another batch shape; bfloat16 by up to 0.3 in the field.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@torch.no_grad()
def audit(scorer: "Scorer", rows: RowSet, reference: RefLogps) -> float:
    """Largest |policy - reference| over a few examples, in nats a token; raises `CorruptError` beyond tolerance."""
    worst = 0.0
    chosen = np.linspace(0, rows.num_examples - 1, min(NUM_EXAMPLES, rows.num_examples)).astype(int)
    for example in np.unique(chosen):
        group = np.arange(rows.starts[example], rows.ends[example])
        token_logps = scorer(build_pack(rows, [group])).completion_logps.cpu().numpy()
        ends = np.cumsum(rows.completion_lengths[group])
        for row, live in zip(group, np.split(token_logps, ends[:-1]), strict=True):
            cached = reference.get(rows.keys[row])
            if len(cached) != len(live):
                raise CorruptError(
                    f"Row {rows.keys[row].hex()} has {len(live)} tokens but {len(cached)} reference log-probs in {reference.folder}."
                )
            differences = np.abs(live - cached)
            worst = max(worst, float(differences.max()))
            if not worst <= TOLERANCES[scorer.compute.dtype]:
                token = int(differences.argmax())
                raise CorruptError(
                    f"Row {rows.keys[row].hex()} ({rows.sources[row]}), completion token {token}: the cached reference "
                    f"log-prob is {cached[token]:.6f}, the same model now gives {live[token]:.6f}. The store "
                    f"{reference.folder} is not of this model: delete it and run `align cache-ref` again."
                )
    return worst
