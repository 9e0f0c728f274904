"""How each field of `Rows` is computed from a scored pack: the one table of what a loss may need of its rows.

In: a pack, its token log-probs, the row set it is from, the reference store.  Out: one float32 value for each row of
the pack. The other names a loss may list in `needs` are not of rows: `kl` is filled in `step.py`, `desirable` is there
for every loss and is listed for the checks in `stages/train/preflight.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.engine.packs import Pack, PackLogps


@dataclass(frozen=True)
class RowSource:
    """What is known of the rows besides the policy: their columns, and for losses that need them, two things more.

    `density_ratios` has one float32 for each row of `rows`.
    """

    rows: RowSet
    reference: RefLogps | None
    density_ratios: np.ndarray | None


class ScoredPack:
    """A pack with its log-probs; each part that fields share is computed once, when a field first reads it."""

    def __init__(self, source: RowSource, pack: Pack, logps: PackLogps) -> None:
        """Take the pack and log-probs of `Scorer`, whose device the fields are computed on."""
        self.source, self.pack, self.logps = source, pack, logps
        self.device = logps.completion_logps.device
        self._token_rows = pack.token_rows.to(self.device)  # (completion tokens,)

    def row_sums(self, values: Tensor) -> Tensor:
        """Sum of the values of each row's tokens: (completion tokens,) -> (rows,), float32."""
        zeros = torch.zeros(len(self.pack.rows), device=self.device)
        return zeros.index_add(0, self._token_rows, values)

    def column(self, values: np.ndarray) -> Tensor:
        """The pack's rows of a column of the row set: (rows of the set,) -> (rows,), float32."""
        return torch.from_numpy(values[self.pack.rows]).float().to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """1 on the tokens that count: (completion tokens,)."""
        return self.pack.mask.to(self.device)

    @cached_property
    def num_tokens(self) -> Tensor:
        """Number of tokens that count in each row: (rows,)."""
        return self.row_sums(self.mask)

    @cached_property
    def ref_token_logps(self) -> Tensor:
        """The reference's log-prob of each token: (completion tokens,)."""
        assert self.source.reference is not None, "a loss that needs the reference was given no store"
        values = [self.source.reference.get(self.source.rows.keys[row]) for row in self.pack.rows]
        return torch.from_numpy(np.concatenate(values)).to(self.device)

    @cached_property
    def shared_mask(self) -> Tensor:
        """1 on the first min(n_chosen, n_rejected) tokens that count of each row: (completion tokens,)."""
        rows, mask = self.source.rows, self.pack.mask.numpy()
        parts = np.split(mask, np.cumsum(rows.completion_lengths[self.pack.rows])[:-1])
        examples = rows.example_of(self.pack.rows)
        shortest: dict[int, int] = {}
        for example, part in zip(examples, parts, strict=True):
            shortest[example] = min(int(part.sum()), shortest.get(example, len(part)))
        shared = [
            part * (np.cumsum(part) <= shortest[example])
            for example, part in zip(examples, parts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(shared)).to(self.device)

    @cached_property
    def prompts(self) -> list[tuple[int, int]]:
        """Scored tokens of each example's prompt, and the number of rows that share it."""
        return [
            (segment.prompt_length - 1, len(segment.completion_lengths))
            for segment in self.pack.segments
            if segment.completion_lengths
        ]

    def for_rows(self, values: Tensor) -> Tensor:
        """A value of each example's prompt for each of the example's rows: (examples,) -> (rows,)."""
        shared_by = torch.tensor([rows for _, rows in self.prompts], device=self.device)
        return values.repeat_interleave(shared_by)


def _collision_logps(scored: ScoredPack) -> Tensor:
    assert scored.logps.collision_logps is not None, "a loss that needs collision_logps was scored without"
    return scored.row_sums(scored.logps.collision_logps * scored.mask) / scored.num_tokens


def _prompt_logps(scored: ScoredPack) -> Tensor:
    parts = scored.logps.prompt_logps.split([tokens for tokens, _ in scored.prompts])
    return scored.for_rows(torch.stack([part.sum() for part in parts]))


def _num_prompt_tokens(scored: ScoredPack) -> Tensor:
    return scored.for_rows(
        torch.tensor([float(tokens) for tokens, _ in scored.prompts], device=scored.device)
    )


def _density_ratios(scored: ScoredPack) -> Tensor:
    assert scored.source.density_ratios is not None, "a loss that needs density ratios was given none"
    return scored.column(scored.source.density_ratios)


# The policy's and the reference's token log-probs go through the same summation, so that equal tokens give a
# log-ratio of exactly zero.
FIELDS: Mapping[str, Callable[[ScoredPack], Tensor]] = {
    "logps": lambda scored: scored.row_sums(scored.logps.completion_logps * scored.mask),
    "num_tokens": lambda scored: scored.num_tokens,
    "ref_logps": lambda scored: scored.row_sums(scored.ref_token_logps * scored.mask),
    "weights": lambda scored: scored.column(scored.source.rows.weights),
    "scores": lambda scored: scored.column(scored.source.rows.scores),
    "shared_logps": lambda scored: scored.row_sums(scored.logps.completion_logps * scored.shared_mask),
    "ref_shared_logps": lambda scored: scored.row_sums(scored.ref_token_logps * scored.shared_mask),
    "collision_logps": _collision_logps,
    "prompt_logps": _prompt_logps,
    "num_prompt_tokens": _num_prompt_tokens,
    "density_ratios": _density_ratios,
}
ALWAYS = frozenset({"logps", "num_tokens"})
