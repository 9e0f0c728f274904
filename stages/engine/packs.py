"""A pack: many rows as a tree of tokens (`prefix_tree.py`), what several of them begin with once, without padding.

    [ prompt A | completion A1 | completion A2 | prompt B | completion B1 | ... ]

Position ids are the places of tokens in their rows. The first token of a completion is predicted at the last token of the
prompt, which is therefore a predictor once for each completion. The last token of a completion predicts no target, so it
is not an input.

Axes in the shape comments of `stages/engine/`:

    positions           inputs of one forward pass
    targets             scored tokens: the completion tokens, then the prompt tokens if prompts are scored
    distinct targets    the same, where rows that share the target and all before it count once
    completion tokens   all tokens of the pack's completions, masked or not, row after row
    prompt tokens       the tokens of each prompt from the second on
    rows                completions of the pack
    chunk               a part of the targets that is multiplied with the output layer at once
    heads, head_dim, width (of a hidden state), vocabulary
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from stages.data.rows import RowSet
from stages.engine.prefix_tree import Run, grow

# A pack is filled up to a multiple of this many positions. On a CPU, matmuls of a few rows and the ends of vectorised
# loops round differently. With whole multiples the float32 log-probs of a row do not depend on the other rows of its
# pack, so at step 0 the cached log-probs and those of the policy are equal to the bit.
POSITION_MULTIPLE = 16


class PackedExample(NamedTuple):
    """Tokens of the prompt that these rows share, their number, and whether the prompt's own tokens are scored."""

    prompt_length: int
    num_rows: int
    is_scored: bool


@dataclass(frozen=True)
class Pack:
    """The inputs of one forward pass and the tokens that are scored in it."""

    input_ids: torch.Tensor  # (1, positions), int64
    position_ids: torch.Tensor  # (1, positions), int64
    runs: tuple[Run, ...]
    inputs: tuple[np.ndarray, ...]  # of each row: the positions of its inputs
    examples: tuple[PackedExample, ...]  # in the order of the rows
    predictors: torch.Tensor  # (targets,): the position whose hidden state predicts the target
    targets: torch.Tensor  # (targets,): token ids
    distinct: torch.Tensor  # (distinct targets,): index into `targets`
    copies: torch.Tensor  # (targets,): index into `distinct`
    token_rows: torch.Tensor  # (completion tokens,): index into `rows`
    mask: torch.Tensor  # (completion tokens,), float32: the completion mask
    rows: np.ndarray  # (rows,): row numbers in the row set

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and whole completion: (rows,)."""
        return np.array([len(positions) + 1 for positions in self.inputs], dtype=np.int64)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each row's prompt: (rows,)."""
        return np.repeat(*np.array([(one.prompt_length, one.num_rows) for one in self.examples]).T)

    def row_tokens(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The token ids of each row's prompt and of its whole completion."""
        cursor = 0
        for inputs, prompt_length in zip(self.inputs, self.prompt_lengths, strict=True):
            size = len(inputs) + 1 - prompt_length
            places = torch.from_numpy(inputs[:prompt_length]).to(self.input_ids.device)
            yield self.input_ids[0, places], self.targets[cursor : cursor + size]
            cursor += size

    def to(self, device: torch.device) -> "Pack":
        """The pack with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def filled(self, multiple: int) -> "Pack":
        """The pack filled up to a multiple of `multiple` positions; the appended positions predict no target."""
        length = self.input_ids.shape[1]
        if not (padding := -length % multiple):
            return self
        ids = torch.nn.functional.pad(self.input_ids, (0, padding))
        # Small positions: some architectures take the largest one for the length of the row.
        tail = torch.arange(padding, device=ids.device)[None] % POSITION_MULTIPLE
        positions = torch.cat([self.position_ids, tail], dim=1)
        return replace(
            self, input_ids=ids, position_ids=positions, runs=(*self.runs, Run(length, 0, padding))
        )


class PackedRow(NamedTuple):
    """Token ids of a row's prompt and whole completion, and the completion mask."""

    prompt: np.ndarray
    completion: np.ndarray
    mask: np.ndarray


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
    device = pack.input_ids.device
    tokens = torch.from_numpy(kept).to(device)[pack.token_rows]
    masks = pack.mask.split(pack.token_rows.bincount(minlength=len(kept)).tolist())
    rows = [
        PackedRow(prompt.cpu().numpy(), completion.cpu().numpy(), mask.cpu().numpy())
        for (prompt, completion), mask in zip(pack.row_tokens(), masks, strict=True)
    ]
    examples, prompts, first = [], [np.zeros(0, bool)], 0
    for example in pack.examples:
        own = kept[first : first + example.num_rows]
        scored = example.is_scored and bool(own[0])
        if example.is_scored:
            prompts.append(np.full(example.prompt_length - 1, own[0]))
        if own.any():
            examples.append(PackedExample(example.prompt_length, int(own.sum()), scored))
        first += example.num_rows
    part = _pack([row for row, is_kept in zip(rows, kept, strict=True) if is_kept], examples, pack.rows[kept])
    return part.to(device), tokens, torch.from_numpy(np.concatenate(prompts)).to(device)


def inputs_of(rows: RowSet, numbers: Iterable[int]) -> list[np.ndarray]:
    """The inputs of rows: prompt and completion without the last token of the latter, int32."""
    return [np.concatenate([rows.prompt(row), rows.completion(row)[:-1]]) for row in numbers]


def build_pack(rows: RowSet, groups: Sequence[np.ndarray], with_prompts: bool = False) -> Pack:
    """The pack of `groups`, each the row numbers of one example; `with_prompts` makes the prompts' tokens targets too."""
    numbers = np.concatenate(groups)
    packed = [PackedRow(rows.prompt(row), rows.completion(row), rows.mask(row)) for row in numbers]
    examples = [
        PackedExample(int(rows.prompt_lengths[group[0]]), len(group), with_prompts) for group in groups
    ]
    return _pack(packed, examples, numbers)


def _pack(rows: Sequence[PackedRow], examples: Sequence[PackedExample], numbers: np.ndarray) -> Pack:
    tree = grow([np.concatenate([row.prompt, row.completion[:-1]]) for row in rows])
    predictors = [inputs[len(row.prompt) - 1 :] for row, inputs in zip(rows, tree.rows, strict=True)]
    targets = [row.completion for row in rows]
    first = 0
    for example in examples:
        if example.is_scored:
            predictors.append(tree.rows[first][: example.prompt_length - 1])
            targets.append(rows[first].prompt[1:])
        first += example.num_rows
    predicting, scored = np.concatenate(predictors), np.concatenate(targets).astype(np.int64)
    pairs = predicting * (scored.max() + 1) + scored
    _, distinct, copies = np.unique(pairs, return_index=True, return_inverse=True)
    places = np.concatenate([run.place + np.arange(run.length) for run in tree.runs])
    pack = Pack(
        input_ids=torch.from_numpy(tree.tokens.astype(np.int64))[None],
        position_ids=torch.from_numpy(places)[None],
        runs=tree.runs,
        inputs=tree.rows,
        examples=tuple(examples),
        predictors=torch.from_numpy(predicting),
        targets=torch.from_numpy(scored),
        distinct=torch.from_numpy(distinct),
        copies=torch.from_numpy(copies),
        token_rows=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.completion) for row in rows])),
        mask=torch.from_numpy(np.concatenate([row.mask for row in rows]).astype(np.float32)),
        rows=numbers,
    )
    return pack.filled(POSITION_MULTIPLE)
