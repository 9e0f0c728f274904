"""A pack: many examples in one row of tokens, each prompt once, nothing padded.

    [ prompt A | completion A1 | completion A2 | prompt B | completion B1 | ... ]

Positions restart after the prompt for each completion. The last token of a completion predicts
nothing that is scored, so it is not fed; the first is predicted by the prompt's last position, which
is therefore scored once for each completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from stages.data.rows import RowSet

# A pack is filled up to a multiple of this many positions. On a CPU, matmuls of a few rows and the
# tails of vectorised loops round differently; with whole multiples a row's float32 log-probs do not
# depend on what it is packed with, so at step 0 cached and live log-probs are equal to the bit.
POSITION_MULTIPLE = 16


@dataclass(frozen=True)
class Segment:
    """One example in a pack: its first position, prompt length, and fed length of each completion."""

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions of the whole example."""
        return self.prompt_length + sum(self.completion_lengths)


@dataclass(frozen=True)
class Pack:
    """Inputs of one forward pass and what is scored in it.

    `input_ids`, `position_ids`: (1, positions). `predictors`: position whose hidden state predicts
    each scored token; `targets`: that token; both (tokens,), the completions' tokens in order, then
    those of the prompts where they are scored, each from its second. `token_rows`: index into `rows` a
    completion token belongs to; `mask`: whether it counts; both (completion tokens,). `rows`: row
    numbers in the row set, in the order scored.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    token_rows: torch.Tensor
    mask: torch.Tensor
    rows: np.ndarray

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and whole completion: (rows,)."""
        lengths = [
            segment.prompt_length + fed + 1 for segment in self.segments for fed in segment.completion_lengths
        ]
        return np.array(lengths, dtype=np.int64)

    def to(self, device: torch.device) -> "Pack":
        """The pack with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def filled(self, multiple: int) -> "Pack":
        """The pack with positions that nobody looks at appended, up to a multiple of `multiple`."""
        length = self.input_ids.shape[1]
        if not (padding := -length % multiple):
            return self
        segments = (*self.segments, Segment(length, padding, ()))
        ids = torch.nn.functional.pad(self.input_ids, (0, padding))
        # Small positions: some architectures take the largest one for the length of the row.
        tail = torch.arange(padding, device=ids.device)[None] % POSITION_MULTIPLE
        positions = torch.cat([self.position_ids, tail], dim=1)
        return replace(self, input_ids=ids, position_ids=positions, segments=segments)


class PackLogps(NamedTuple):
    """Log-probs of a pack's targets, float32, nats.

    `completion_logps`: (completion tokens,). `prompt_logps`: (prompt tokens,), empty where the pack was built without
    them. `collision_logps`: log sum_v pi(v)^2 at each completion token, without gradient, where it was asked for.
    """

    # A named tuple and no dataclass: FSDP looks for the tensors of an output with torch's pytree, which knows tuples.
    completion_logps: torch.Tensor
    prompt_logps: torch.Tensor
    collision_logps: torch.Tensor | None = None


def part_of(pack: Pack, kept: np.ndarray) -> tuple[Pack, torch.Tensor, torch.Tensor]:
    """The pack of some rows of another, `kept` (rows,) bool, and which tokens of that one it scores.

    These are (completion tokens,) bool and (prompt tokens,) bool; a prompt is scored with the first row of its example.
    """
    positions = np.zeros(pack.input_ids.shape[1], bool)
    segments, prompts, row, start = [], [np.zeros(0, bool)], 0, 0
    for segment in pack.segments:
        own = kept[row : row + len(segment.completion_lengths)]
        lengths = [segment.prompt_length, *segment.completion_lengths]
        positions[segment.start : segment.start + segment.length] = np.repeat([own.any(), *own], lengths)
        if own.any():
            segments.append(Segment(start, lengths[0], tuple(np.array(lengths[1:])[own].tolist())))
            start += segments[-1].length
        if len(own):  # else positions that nobody looks at
            prompts.append(np.full(lengths[0] - 1, own[0]))
        row += len(own)
    device = pack.input_ids.device
    chosen, rows = torch.from_numpy(positions).to(device), torch.from_numpy(kept).to(device)
    tokens = rows[pack.token_rows]
    with_prompts = len(pack.targets) > len(tokens)
    prompt_tokens = torch.from_numpy(np.concatenate(prompts)).to(device)[: None if with_prompts else 0]
    scored = torch.cat([tokens, prompt_tokens])
    part = Pack(
        input_ids=pack.input_ids[:, chosen],
        position_ids=pack.position_ids[:, chosen],
        segments=tuple(segments),
        predictors=(chosen.cumsum(0) - 1)[pack.predictors[scored]],
        targets=pack.targets[scored],
        token_rows=(rows.cumsum(0) - 1)[pack.token_rows[tokens]],
        mask=pack.mask[tokens],
        rows=pack.rows[kept],
    )
    return part.filled(POSITION_MULTIPLE), tokens, prompt_tokens


def fed_length(rows: RowSet, group: np.ndarray) -> int:
    """Positions that the rows of one example take in a pack."""
    return int(rows.prompt_lengths[group[0]] + (rows.completion_lengths[group] - 1).sum())


def build_pack(rows: RowSet, groups: Sequence[np.ndarray], with_prompts: bool = False) -> Pack:
    """The pack of `groups`, each holding row numbers that share a prompt; the prompts are scored too if asked."""
    ids, positions, segments, predictors, targets, token_rows, masks = [], [], [], [], [], [], []
    prompt_predictors, prompt_targets = [], []
    start = 0
    for group in groups:
        prompt = rows.prompt(group[0])
        if with_prompts:
            prompt_predictors.append(np.arange(start, start + len(prompt) - 1))
            prompt_targets.append(prompt[1:])
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        cursor = start + len(prompt)
        for row in group:
            completion = rows.completion(row)
            fed = len(completion) - 1
            ids.append(completion[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + fed))
            predictors.append(np.concatenate([[start + len(prompt) - 1], np.arange(cursor, cursor + fed)]))
            targets.append(completion)
            masks.append(rows.mask(row))
            cursor += fed
        segments.append(
            Segment(start, len(prompt), tuple(int(rows.completion_lengths[row]) - 1 for row in group))
        )
        start = cursor
    numbers = np.concatenate(groups)
    token_rows = np.repeat(np.arange(len(numbers)), rows.completion_lengths[numbers])
    pack = Pack(
        input_ids=_tensor(ids, np.int64)[None],
        position_ids=_tensor(positions, np.int64)[None],
        segments=tuple(segments),
        predictors=_tensor(predictors + prompt_predictors, np.int64),
        targets=_tensor(targets + prompt_targets, np.int64),
        token_rows=torch.from_numpy(token_rows),
        mask=_tensor(masks, np.float32),
        rows=numbers,
    )
    return pack.filled(POSITION_MULTIPLE)


def _tensor(arrays: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype))
