"""From rows to what a loss sees: policy log-probs beside cached reference log-probs, a value for each row.

In: groups of row numbers, each the rows of one example.  Out: `Rows` and `Batch`, with gradient where that is on.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache.ref_logps import RefLogps
from stages.data.pairs import Pairs
from stages.data.rows import RowSet
from stages.engine.packing import deal, pack_lengths
from stages.engine.packs import Pack, build_pack, fed_length
from stages.losses.contract import Batch, Loss, Rows
from stages.runtime.distributed import World
from stages.settings.train import PairStrategy
from stages.train.step.density_ratio import DensityRatios
from stages.train.step.row_fields import ALWAYS, FIELDS, RowSource, ScoredPack

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer


class RowScorer:
    """Scores groups of rows of one split for one loss."""

    def __init__(
        self,
        scorer: "Scorer",
        rows: RowSet,
        reference: RefLogps | None,
        loss: Loss,
        world: World,
        pairs: PairStrategy = "best_worst",
        density_ratios: np.ndarray | None = None,
    ) -> None:
        """Line up `rows` with `reference` (None for a reference-free loss); ranked lists are compared by `pairs`.

        `density_ratios`, one for each row, are there for a loss that needs them.
        """
        self.scorer, self.rows, self.loss, self.world = scorer, rows, loss, world
        self.pairs = Pairs(rows, pairs)
        self.device = scorer.compute.device
        self._source = RowSource(rows, reference, density_ratios)
        self._fields = [name for name in FIELDS if name in ALWAYS | loss.needs]

    def packs(self, groups: Sequence[np.ndarray]) -> list[Pack]:
        """This rank's packs of the groups; the same plan is made on every rank."""
        plan, shares = self._plan(groups)
        with_prompts = "prompt_logps" in self._fields
        return [
            build_pack(self.rows, [groups[item] for item in plan[number]], with_prompts)
            for number in shares[self.world.rank]
        ]

    def company(self, groups: Sequence[np.ndarray]) -> list[Pack]:
        """Packs to score for nothing, where the model is sharded: its ranks run every forward pass together."""
        if not self.world.sharded:
            return []
        _, shares = self._plan(groups)
        idle = max(len(share) for share in shares) - len(shares[self.world.rank])
        shortest = min(groups, key=lambda group: fed_length(self.rows, group))
        return [build_pack(self.rows, [shortest])] * idle

    def _plan(self, groups: Sequence[np.ndarray]) -> tuple[list[list[int]], list[list[int]]]:
        """Groups of each pack, and packs of each rank."""
        lengths = [fed_length(self.rows, group) for group in groups]
        plan = pack_lengths(lengths, self.scorer.compute.tokens_per_batch)
        return plan, deal([sum(lengths[item] for item in items) for items in plan], self.world.size)

    def score(self, pack: Pack) -> Rows:
        """Log-probs of the pack's rows, with gradient where that is on."""
        logps = self.scorer(pack, with_collisions="collision_logps" in self._fields)
        scored = ScoredPack(self._source, pack, logps)
        return Rows(**{name: FIELDS[name](scored) for name in self._fields})

    @torch.no_grad()
    def score_all(self, groups: Sequence[np.ndarray]) -> Rows:
        """Log-probs of all rows of the groups, over all ranks, in the groups' order, without gradient."""
        numbers = np.concatenate(groups)
        position = {int(row): index for index, row in enumerate(numbers)}
        scored = [
            ([position[int(row)] for row in pack.rows], self.score(pack)) for pack in self.packs(groups)
        ]
        for pack in self.company(groups):
            self.scorer(pack)
        columns = {name: torch.zeros(len(numbers), device=self.device) for name in self._fields}
        for name, column in columns.items():
            for places, rows in scored:
                column[places] = rows.get(name)
            self.world.sum_(column)
        return Rows(**columns)

    def batch(self, numbers: np.ndarray, rows: Rows) -> Batch:
        """How the rows of these row numbers compare: which are desirable, and which pair up."""
        roles = self.rows.roles[numbers]
        chosen, rejected = torch.from_numpy(self.pairs.among(numbers)).to(self.device).unbind(1)
        desirable = torch.from_numpy(roles == "desirable").to(self.device)
        desirable[chosen] = True
        return Batch(rows, desirable, chosen, rejected)


def make_row_scorers(
    scorer: "Scorer",
    row_sets: Iterable[RowSet],
    reference: RefLogps | None,
    loss: Loss,
    world: World,
    pairs: PairStrategy,
    train_rows: Callable[[], RowSet],
) -> list[RowScorer]:
    """A `RowScorer` for each row set; what a loss needs that is fitted on the training rows is fitted once."""
    ratios = DensityRatios(train_rows()) if "density_ratios" in loss.needs else None
    return [
        RowScorer(scorer, rows, reference, loss, world, pairs, None if ratios is None else ratios.of(rows))
        for rows in row_sets
    ]
