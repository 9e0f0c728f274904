"""The table of what a loss may need of its rows: for each field of `Rows`, the function that computes it.

In: a pack, its token log-probs, and the data of the rows.  Out: one float64 value for each row of the pack. Two names
in `Loss.needs` are not in the table: `kl` belongs to the whole step (`step.py`), and `desirable` is given to every
loss and is listed only for the checks in `stages/train/preflight.py`.
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
    """The data of the rows of a split; the last two are None unless the loss needs them."""

    rows: RowSet
    reference: RefLogps | None
    density_ratios: np.ndarray | None  # (rows of the split,), float32


def device_of_fields(device: torch.device) -> torch.device:
    """Where fields and losses are computed: beside the model; on a CPU for Apple's GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


class ScoredPack:
    """A pack with its log-probs, and the intermediate values of its fields, each computed on first use."""

    def __init__(self, source: RowSource, pack: Pack, logps: PackLogps) -> None:
        """`logps` is what `Scorer` returned for `pack`; the fields are computed on `device_of_fields` of its device."""
        self.source, self.pack = source, pack
        self.device = device_of_fields(logps.completion_logps.device)
        completion, prompt, collision = logps
        self.logps = PackLogps(
            completion.to(self.device),
            prompt.to(self.device),
            None if collision is None else collision.to(self.device),
        )
        self._token_rows = pack.token_rows.to(self.device)  # (completion tokens,)

    def row_sums(self, values: Tensor) -> Tensor:
        """Sum of the values of each row's tokens, float64: (completion tokens,) -> (rows,)."""
        # A float32 log-ratio of 32,768 tokens, the difference of two sums of 1e5 nats, would be off by half a nat.
        zeros = torch.zeros(len(self.pack.rows), dtype=torch.float64, device=self.device)
        return zeros.index_add(0, self._token_rows, values.double())

    def column(self, values: np.ndarray) -> Tensor:
        """The values of the pack's rows in a column of the split, float64: (rows of the split,) -> (rows,)."""
        return torch.from_numpy(values[self.pack.rows]).double().to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """The completion mask: (completion tokens,)."""
        return self.pack.mask.to(self.device)

    @cached_property
    def num_tokens(self) -> Tensor:
        """Number of tokens of each row whose mask is 1: (rows,)."""
        return self.row_sums(self.mask)

    @cached_property
    def ref_token_logps(self) -> Tensor:
        """The reference's log-prob of each token: (completion tokens,)."""
        assert self.source.reference is not None, "a loss that needs the reference was given no store"
        values = [self.source.reference.get(self.source.rows.keys[row]) for row in self.pack.rows]
        return torch.from_numpy(np.concatenate(values)).to(self.device)

    @cached_property
    def shared_mask(self) -> Tensor:
        """The completion mask up to min(n_chosen, n_rejected) tokens of each example: (completion tokens,)."""
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
        """For each example: the number of scored tokens of its prompt, and the number of its rows."""
        return [(example.prompt_length - 1, example.num_rows) for example in self.pack.examples]

    def repeat_for_rows(self, values: Tensor) -> Tensor:
        """Repeat the value of each example for each of its rows: (examples,) -> (rows,)."""
        shared_by = torch.tensor([rows for _, rows in self.prompts], device=self.device)
        return values.repeat_interleave(shared_by)


def _collision_logps(scored: ScoredPack) -> Tensor:
    assert scored.logps.collision_logps is not None, "a loss that needs collision_logps was scored without"
    return scored.row_sums(scored.logps.collision_logps * scored.mask) / scored.num_tokens


def _prompt_logps(scored: ScoredPack) -> Tensor:
    parts = scored.logps.prompt_logps.split([tokens for tokens, _ in scored.prompts])
    return scored.repeat_for_rows(torch.stack([part.double().sum() for part in parts]))


def _num_prompt_tokens(scored: ScoredPack) -> Tensor:
    tokens = [tokens for tokens, _ in scored.prompts]
    return scored.repeat_for_rows(torch.tensor(tokens, dtype=torch.float64, device=scored.device))


def _density_ratios(scored: ScoredPack) -> Tensor:
    assert scored.source.density_ratios is not None, "a loss that needs density ratios was given none"
    return scored.column(scored.source.density_ratios)


# The token log-probs of the policy and of the reference are summed by the same function, so that equal values give a
# log-ratio of exactly 0.
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
