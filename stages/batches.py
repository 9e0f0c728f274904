"""From rows to what a loss sees: policy log-probs beside cached reference log-probs, sums over kept tokens.

The policy's and the reference's token log-probs go through the same summation, so that equal tokens
give a log-ratio of exactly zero.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cache.ref_logps import RefLogps
from stages.losses.contract import Batch, Loss, Rows
from stages.packs import Pack, build_pack, fed_length
from stages.parallel import World
from stages.planning import deal, pack
from stages.rows import RowSet

if TYPE_CHECKING:
    from stages.scoring import Scorer

DESIRABLE = ("chosen", "desirable")


class RowScorer:
    """Scores groups of rows of one split for one loss."""

    def __init__(
        self, scorer: "Scorer", rows: RowSet, reference: RefLogps | None, loss: Loss, world: World
    ) -> None:
        """Line up `rows` with `reference` (None for a reference-free loss)."""
        self.scorer, self.rows, self.reference, self.loss, self.world = scorer, rows, reference, loss, world
        self.device = scorer.compute.device

    def packs(self, groups: Sequence[np.ndarray]) -> list[Pack]:
        """This rank's packs of the groups; the same plan is made on every rank."""
        lengths = [fed_length(self.rows, group) for group in groups]
        plan = pack(lengths, self.scorer.compute.tokens_per_batch)
        costs = [sum(lengths[item] for item in items) for items in plan]
        mine = deal(costs, self.world.size)[self.world.rank]
        return [build_pack(self.rows, [groups[item] for item in plan[number]]) for number in mine]

    def score(self, batch: Pack) -> Rows:
        """Log-probs of the pack's rows, with gradient where that is on."""
        collision = None
        if self.loss.needs_vocab_sum:
            token_logps, token_collisions = self.scorer(batch, collision=True)
        else:
            token_logps, token_collisions = self.scorer(batch), None
        mask = batch.mask.to(self.device)
        sums = _RowSums(batch.token_rows.to(self.device), len(batch.rows))
        num_tokens = sums(mask)
        if token_collisions is not None:
            collision = sums(token_collisions * mask) / num_tokens
        shared = self._shared_mask(batch).to(self.device) if self.loss.needs_shared_length else None
        ref_tokens = self._reference_tokens(batch) if self.loss.needs_reference else None
        return Rows(
            logps=sums(token_logps * mask),
            num_tokens=num_tokens,
            ref_logps=None if ref_tokens is None else sums(ref_tokens * mask),
            weights=self._weights(batch) if self.loss.takes_weights else None,
            scores=torch.from_numpy(self.rows.scores[batch.rows]).float().to(self.device),
            shared_logps=None if shared is None else sums(token_logps * shared),
            ref_shared_logps=None if shared is None or ref_tokens is None else sums(ref_tokens * shared),
            collision_logps=collision,
        )

    @torch.no_grad()
    def score_all(self, groups: Sequence[np.ndarray]) -> Rows:
        """Log-probs of all rows of the groups, over all ranks, in the groups' order, without gradient."""
        numbers = np.concatenate(groups)
        position = {int(row): index for index, row in enumerate(numbers)}
        scored = [(batch, self.score(batch)) for batch in self.packs(groups)]
        columns: dict[str, Tensor | None] = {}
        for name in self._field_names():
            column = torch.zeros(len(numbers), device=self.device)
            for batch, part in scored:
                column[[position[int(row)] for row in batch.rows]] = getattr(part, name)
            columns[name] = self.world.sum_(column)
        return Rows(**columns)  # type: ignore[arg-type]

    def batch(self, numbers: np.ndarray, rows: Rows) -> Batch:
        """How the rows of these row numbers compare: which are desirable, and which pair up."""
        roles = self.rows.roles[numbers]
        chosen = np.flatnonzero(roles == "chosen")
        rejected = np.flatnonzero(roles == "rejected")
        return Batch(
            rows=rows,
            desirable=torch.from_numpy(np.isin(roles, DESIRABLE)).to(self.device),
            chosen=torch.from_numpy(chosen).to(self.device),
            rejected=torch.from_numpy(rejected).to(self.device),
        )

    def _field_names(self) -> list[str]:
        names = ["logps", "num_tokens", "scores"]
        names += ["weights"] if self.loss.takes_weights else []
        names += ["ref_logps"] if self.loss.needs_reference else []
        names += ["shared_logps"] if self.loss.needs_shared_length else []
        names += ["ref_shared_logps"] if self.loss.needs_shared_length and self.loss.needs_reference else []
        return names + (["collision_logps"] if self.loss.needs_vocab_sum else [])

    def _weights(self, batch: Pack) -> Tensor:
        return torch.from_numpy(self.rows.weights[batch.rows]).to(self.device)

    def _reference_tokens(self, batch: Pack) -> Tensor:
        assert self.reference is not None, "a loss that needs the reference was given no store"
        values = [self.reference.get(self.rows.keys[row]) for row in batch.rows]
        return torch.from_numpy(np.concatenate(values)).to(self.device)

    def _shared_mask(self, batch: Pack) -> Tensor:
        """1 on the first min(n_chosen, n_rejected) kept tokens of each row."""
        mask = batch.mask.numpy()
        ends = np.cumsum(self.rows.completion_lengths[batch.rows])
        kept = [int(part.sum()) for part in np.split(mask, ends[:-1])]
        ids = [(self.rows.example_ids[row], self.rows.sources[row]) for row in batch.rows]
        shortest: dict[tuple[str, str], int] = {}
        for name, count in zip(ids, kept, strict=True):
            shortest[name] = min(count, shortest.get(name, count))
        parts = [
            part * (np.cumsum(part) <= shortest[name])
            for part, name in zip(np.split(mask, ends[:-1]), ids, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))


class _RowSums:
    """Sums of token values for each row, float32."""

    def __init__(self, token_rows: Tensor, num_rows: int) -> None:
        self.token_rows, self.num_rows = token_rows, num_rows

    def __call__(self, values: Tensor) -> Tensor:
        return torch.zeros(self.num_rows, device=values.device).index_add(0, self.token_rows, values)
