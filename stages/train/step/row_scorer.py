"""From row numbers to the tensors of a loss: packs the rows, scores them with the policy, adds the reference.

In: groups of row numbers, each group the rows of one example.  Out: `Rows` and `Batch`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache.ref_logps import RefLogps
from stages.data.pairs import Pairs
from stages.data.rows import RowSet
from stages.engine.packing import deal
from stages.engine.packs import Pack, build_pack, inputs_of
from stages.engine.prefix_tree import num_tokens
from stages.losses.contract import Batch, Loss, Rows
from stages.runtime.distributed import World
from stages.settings.train import PairStrategy
from stages.train.step.density_ratio import DensityRatios
from stages.train.step.row_fields import ALWAYS, FIELDS, RowSource, ScoredPack, device_of_fields

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer


class RowScorer:
    """Scores rows of one split for one loss."""

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
        """`reference` is None for a loss that needs none; `pairs` chooses the pairs of ranked lists.

        `density_ratios`, (rows of the split,) float32, is None unless the loss needs them.
        """
        self.scorer, self.rows, self.loss, self.world = scorer, rows, loss, world
        self.pairs = Pairs(rows, pairs)
        self.device = device_of_fields(scorer.compute.device)
        self._source = RowSource(rows, reference, density_ratios)
        self._fields = [name for name in FIELDS if name in ALWAYS | loss.needs]

    def packs(self, groups: Sequence[np.ndarray]) -> list[Pack]:
        """The packs that this rank scores; together the ranks score every group once."""
        packs, shares = self._assign(groups)
        with_prompts = "prompt_logps" in self._fields
        return [
            build_pack(self.rows, [groups[item] for item in packs[number]], with_prompts)
            for number in shares[self.world.rank]
        ]

    def padding_packs(self, groups: Sequence[np.ndarray]) -> list[Pack]:
        """Dummy packs that give this rank as many forward passes as the others; none unless the model is sharded."""
        # FSDP gathers weights in every forward pass, and that takes all ranks.
        if not self.world.sharded:
            return []
        _, shares = self._assign(groups)
        idle = max(len(share) for share in shares) - len(shares[self.world.rank])
        shortest = min(groups, key=lambda group: num_tokens(inputs_of(self.rows, group)))
        return [build_pack(self.rows, [shortest])] * idle

    def _assign(self, groups: Sequence[np.ndarray]) -> tuple[list[list[int]], list[list[int]]]:
        """The groups of each pack, and the packs of each rank; computed alike on every rank."""
        packs = self.scorer.plan(self.rows, groups)
        costs = [
            num_tokens([row for item in items for row in inputs_of(self.rows, groups[item])])
            for items in packs
        ]
        return packs, deal(costs, self.world.size)

    def score(self, pack: Pack) -> Rows:
        """The fields of the pack's rows that the loss needs, (rows of the pack,) each; with gradient if it is enabled."""
        logps = self.scorer(pack, with_collisions="collision_logps" in self._fields)
        scored = ScoredPack(self._source, pack, logps)
        return Rows(**{name: FIELDS[name](scored) for name in self._fields})

    @torch.no_grad()
    def score_all(self, groups: Sequence[np.ndarray]) -> Rows:
        """The fields of all rows of the groups, in their order, without gradient; scored by all ranks together."""
        numbers = np.concatenate(groups)
        position = {int(row): index for index, row in enumerate(numbers)}
        scored = [
            ([position[int(row)] for row in pack.rows], self.score(pack)) for pack in self.packs(groups)
        ]
        for pack in self.padding_packs(groups):
            self.scorer(pack)
        empty = torch.zeros(len(numbers), dtype=torch.float64, device=self.device)
        columns = {name: empty.clone() for name in self._fields}
        for name, column in columns.items():
            for places, rows in scored:
                column[places] = rows.get(name)
            self.world.sum_(column)
        return Rows(**columns)

    def batch(self, numbers: np.ndarray, rows: Rows) -> Batch:
        """`rows`, whose row numbers are `numbers`, with their labels, pairs and lists."""
        roles = self.rows.roles[numbers]
        chosen, rejected = torch.from_numpy(self.pairs.among(numbers)).to(self.device).unbind(1)
        desirable = torch.from_numpy(roles == "desirable").to(self.device)
        desirable[chosen] = True
        examples, lists = np.unique(self.rows.example_of(numbers), return_inverse=True)
        return Batch(
            rows, desirable, chosen, rejected, torch.from_numpy(lists).to(self.device), len(examples)
        )


def make_row_scorers(
    scorer: "Scorer",
    row_sets: Iterable[RowSet],
    reference: RefLogps | None,
    loss: Loss,
    world: World,
    pairs: PairStrategy,
    train_rows: Callable[[], RowSet],
) -> list[RowScorer]:
    """A `RowScorer` for each row set. `train_rows` is called only if the loss needs density ratios, to fit them once."""
    ratios = DensityRatios(train_rows()) if "density_ratios" in loss.needs else None
    return [
        RowScorer(scorer, rows, reference, loss, world, pairs, None if ratios is None else ratios.of(rows))
        for rows in row_sets
    ]
