"""A pack: many examples in one row of tokens, each prompt once, without padding between them.

    [ prompt A | completion A1 | completion A2 | prompt B | completion B1 | ... ]

Position ids restart after the prompt for each completion. The first token of a completion is predicted at the last
position of the prompt, which is therefore a predictor once for each completion. The last token of a completion predicts
no target, so it is not an input.

Axes in the shape comments of `stages/engine/`:

    positions           inputs of one forward pass
    targets             scored tokens: the completion tokens, then the prompt tokens if prompts are scored
    completion tokens   all tokens of the pack's completions, masked or not, row after row
    prompt tokens       the tokens of each prompt from the second on
    rows                completions of the pack
    chunk               a part of the targets that is multiplied with the output layer at once
    heads, head_dim, width (of a hidden state), vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from stages.data.rows import RowSet

# A pack is filled up to a multiple of this many positions. On a CPU, matmuls of a few rows and the ends of vectorised
# loops round differently. With whole multiples the float32 log-probs of a row do not depend on the other rows of its
# pack, so at step 0 the cached log-probs and those of the policy are equal to the bit.
POSITION_MULTIPLE = 16


@dataclass(frozen=True)
class Segment:
    """The positions of one example in a pack: the first one, the prompt's number, and each completion's number.

    A completion has one position less than tokens.
    """

    start: int
    prompt_length: int
    completion_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of positions of the example."""
        return self.prompt_length + sum(self.completion_lengths)


@dataclass(frozen=True)
class Pack:
    """The inputs of one forward pass and the tokens that are scored in it."""

    input_ids: torch.Tensor  # (1, positions), int64
    position_ids: torch.Tensor  # (1, positions), int64
    segments: tuple[Segment, ...]
    predictors: torch.Tensor  # (targets,): the position whose hidden state predicts the target
    targets: torch.Tensor  # (targets,): token ids
    token_rows: torch.Tensor  # (completion tokens,): index into `rows`
    mask: torch.Tensor  # (completion tokens,), float32: the completion mask
    rows: np.ndarray  # (rows,): row numbers in the row set

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and whole completion: (rows,)."""
        lengths = [
            segment.prompt_length + fed + 1 for segment in self.segments for fed in segment.completion_lengths
        ]
        return np.array(lengths, dtype=np.int64)

    def row_tokens(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The token ids of each row's prompt and of its whole completion."""
        cursor = 0
        for segment in self.segments:
            prompt = self.input_ids[0, segment.start : segment.start + segment.prompt_length]
            for fed in segment.completion_lengths:
                yield prompt, self.targets[cursor : cursor + fed + 1]
                cursor += fed + 1

    def to(self, device: torch.device) -> "Pack":
        """The pack with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def filled(self, multiple: int) -> "Pack":
        """The pack filled up to a multiple of `multiple` positions; the appended positions predict no target."""
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

    `prompt_logps` is empty if the pack was built without prompts as targets. `collision_logps` is log sum_v pi(v)^2, v
    over the vocabulary, without gradient; None unless it is requested.
    """

    # A named tuple and not a dataclass, because FSDP finds the tensors of an output by torch's pytree, which does not
    # look into dataclasses.
    completion_logps: torch.Tensor  # (completion tokens,)
    prompt_logps: torch.Tensor  # (prompt tokens,)
    collision_logps: torch.Tensor | None = None  # (completion tokens,)


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


def packed_length(rows: RowSet, group: np.ndarray) -> int:
    """Number of positions of an example in a pack; `group` has the row numbers of the example."""
    return int(rows.prompt_lengths[group[0]] + (rows.completion_lengths[group] - 1).sum())


def build_pack(rows: RowSet, groups: Sequence[np.ndarray], with_prompts: bool = False) -> Pack:
    """The pack of `groups`, each the row numbers of one example; `with_prompts` makes the prompts' tokens targets too."""
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
            length = len(completion) - 1
            ids.append(completion[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + length))
            predictors.append(np.concatenate([[start + len(prompt) - 1], np.arange(cursor, cursor + length)]))
            targets.append(completion)
            masks.append(rows.mask(row))
            cursor += length
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
