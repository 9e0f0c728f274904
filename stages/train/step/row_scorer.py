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
from stages.data.pairs import Pairs
from stages.data.rows import RowSet
from stages.engine.packing import deal, pack
from stages.engine.packs import Pack, build_pack, fed_length
from stages.losses.contract import Batch, Loss, Rows
from stages.runtime.distributed import World
from stages.settings.train import PairStrategy

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
        self.pairs, self.density_ratios = Pairs(rows, pairs), density_ratios
        self.scorer, self.rows, self.reference, self.loss, self.world = scorer, rows, reference, loss, world
        self.device = scorer.compute.device

    def packs(self, groups: Sequence[np.ndarray]) -> list[Pack]:
        """This rank's packs of the groups; the same plan is made on every rank."""
        plan, shares = self._plan(groups)
        with_prompts = self.loss.needs_prompt_logps
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
        plan = pack(lengths, self.scorer.compute.tokens_per_batch)
        return plan, deal([sum(lengths[item] for item in items) for items in plan], self.world.size)

    def score(self, batch: Pack) -> Rows:
        """Log-probs of the pack's rows, with gradient where that is on."""
        collision = None
        if self.loss.needs_vocab_sum:
            token_logps, token_collisions = self.scorer(batch, collision=True)
        else:
            token_logps, token_collisions = self.scorer(batch), None
        token_logps, prompt_token_logps = token_logps.tensor_split([len(batch.token_rows)])
        prompt_logps, num_prompt_tokens = (
            _prompt_sums(batch, prompt_token_logps) if self.loss.needs_prompt_logps else (None, None)
        )
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
            prompt_logps=prompt_logps,
            num_prompt_tokens=num_prompt_tokens,
            density_ratios=self._density_ratios(batch) if self.loss.needs_density_ratios else None,
        )

    @torch.no_grad()
    def score_all(self, groups: Sequence[np.ndarray]) -> Rows:
        """Log-probs of all rows of the groups, over all ranks, in the groups' order, without gradient."""
        numbers = np.concatenate(groups)
        position = {int(row): index for index, row in enumerate(numbers)}
        scored = [(batch, self.score(batch)) for batch in self.packs(groups)]
        for batch in self.company(groups):
            self.scorer(batch)
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
        chosen, rejected = torch.from_numpy(self.pairs.among(numbers)).to(self.device).unbind(1)
        desirable = torch.from_numpy(roles == "desirable").to(self.device)
        desirable[chosen] = True
        return Batch(rows, desirable, chosen, rejected)

    def _field_names(self) -> list[str]:
        names = ["logps", "num_tokens", "scores"]
        names += ["weights"] if self.loss.takes_weights else []
        names += ["ref_logps"] if self.loss.needs_reference else []
        names += ["shared_logps"] if self.loss.needs_shared_length else []
        names += ["ref_shared_logps"] if self.loss.needs_shared_length and self.loss.needs_reference else []
        names += ["prompt_logps", "num_prompt_tokens"] if self.loss.needs_prompt_logps else []
        names += ["density_ratios"] if self.loss.needs_density_ratios else []
        return names + (["collision_logps"] if self.loss.needs_vocab_sum else [])

    def _weights(self, batch: Pack) -> Tensor:
        return torch.from_numpy(self.rows.weights[batch.rows]).to(self.device)

    def _density_ratios(self, batch: Pack) -> Tensor:
        assert self.density_ratios is not None, "a loss that needs density ratios was given none"
        return torch.from_numpy(self.density_ratios[batch.rows]).to(self.device)

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


def _prompt_sums(batch: Pack, token_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the scored tokens of each row's prompt; the rows of an example share theirs."""
    examples = [segment for segment in batch.segments if segment.completion_lengths]
    lengths = [segment.prompt_length - 1 for segment in examples]
    sums = torch.stack([part.sum() for part in token_logps.split(lengths)])
    shared_by = torch.tensor([len(segment.completion_lengths) for segment in examples], device=sums.device)
    numbers = torch.tensor(lengths, dtype=sums.dtype, device=sums.device)
    return sums.repeat_interleave(shared_by), numbers.repeat_interleave(shared_by)


class _RowSums:
    """Sums of token values for each row, float32."""

    def __init__(self, token_rows: Tensor, num_rows: int) -> None:
        self.token_rows, self.num_rows = token_rows, num_rows

    def __call__(self, values: Tensor) -> Tensor:
        return torch.zeros(self.num_rows, device=values.device).index_add(0, self.token_rows, values)
