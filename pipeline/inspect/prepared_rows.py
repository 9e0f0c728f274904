"""Reads a rows artifact for display: statistics of the whole, and examples token by token.

In: a finished `rows` artifact and the tokenizer it was made with. Out: plain data that `terminal.py` and
`page.py` display.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.artifacts import MANIFEST, Artifact, open_artifact
from cache.errors import StaleError, UsageError
from pipeline.inspect.overview import Histogram, Overview
from pipeline.inspect.token_text import Token, TokenTexts
from stages.data.rows import SPLITS
from stages.models.loading import ModelSource, load_tokenizer


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one part: 'prompt', 'trained' (in the loss) or 'masked'."""

    part: str
    tokens: list[Token]


@dataclass(frozen=True)
class ShownCompletion:
    """One completion of an example; truncation removed `cut` tokens from its end."""

    role: str
    score: float | None
    num_tokens: int
    num_trained: int
    cut: int
    spans: list[Span]


@dataclass(frozen=True)
class ShownExample:
    """One example; truncation removed `prompt_cut` tokens from the start of its prompt, or from the end."""

    number: int
    split: str
    source: str
    num_prompt_tokens: int
    prompt_cut: int
    cut_at_start: bool
    prompt: Span
    completions: list[ShownCompletion]


def open_rows(folder: Path, tokenizer: Path | None = None) -> "PreparedRows":
    """Open the rows artifact in `folder` with `tokenizer`, or with the tokenizer that its manifest names.

    Raises `UsageError` if one of them is missing, `StaleError` if the tokenizer is another one.
    """
    if not folder.is_dir():
        raise UsageError(
            f"No such artifact: {folder}. Give a folder under artifacts/rows, or none for the rows of the configuration."
        )
    if not (folder / MANIFEST).is_file():  # may be a whole store, so no advice to delete it
        raise UsageError(
            f"{folder} is no artifact: it has no {MANIFEST}. Give a folder under artifacts/rows, or none for the rows of the "
            f"configuration."
        )
    artifact = open_artifact(folder)
    if artifact.manifest["stage"] != "prepare":
        raise UsageError(
            f"{folder} was written by `align {artifact.manifest['stage']}`. Give a folder that `align prepare` wrote."
        )
    tokenizer = tokenizer or Path(artifact.manifest["provenance"]["tokenizer"])
    if not tokenizer.is_dir():
        raise UsageError(
            f"No tokenizer in {tokenizer}: no such folder. Give the tokenizer of {folder} with --tokenizer DIR."
        )
    return PreparedRows(artifact, load_tokenizer(ModelSource(str(tokenizer), tokenizer)))


class PreparedRows:
    """A rows artifact and its tokenizer."""

    def __init__(self, artifact: Artifact, tokenizer: Any) -> None:
        """Check the shards, and that `tokenizer` made their ids."""
        backend = tokenizer.backend_tokenizer
        expected = artifact.manifest["identity"]["template"]["tokenizer"]
        if hashlib.sha256(backend.to_str().encode()).hexdigest() != expected:
            raise StaleError(
                f"The tokenizer in {tokenizer.name_or_path} is not the one that {artifact.path} was made with. Give that one with --tokenizer DIR."
            )
        self.artifact = artifact
        self._texts = TokenTexts(tokenizer)
        tables = {split: artifact.shards(f"{split}-") for split in SPLITS}
        self._table = pa.concat_tables([table for split in SPLITS for table in tables[split]])
        self._num_train_rows = sum(table.num_rows for table in tables["train"])
        self._starts = _starts(self._table)
        self._lengths = {
            column: pc.call_function("list_value_length", [self._table.column(column)]).to_numpy()
            for column in ("prompt_ids", "completion_ids")
        }

    def __len__(self) -> int:
        """Number of examples in both splits."""
        return len(self._starts)

    def overview(self) -> Overview:
        """Statistics without the mismatched rows, which repeat prompts and completions of other rows."""
        roles = self._table.column("role").to_numpy(zero_copy_only=False)
        own = roles != "mismatched"
        prompts, completions = self._lengths["prompt_ids"], self._lengths["completion_ids"]
        trained = _sums(self._table.column("completion_mask"))
        histograms = [Histogram.of("prompts", prompts[self._starts])]
        histograms += [
            Histogram.of(role, completions[roles == role])
            for role in dict.fromkeys(roles)
            if role != "mismatched"
        ]
        manifest = self.artifact.manifest
        return Overview(
            self.artifact.path,
            self.artifact.counts,
            str(manifest["provenance"]["tokenizer"]),
            histograms,
            int(prompts[self._starts].sum() + completions[own].sum()),
            int(trained[own].sum()),
            int(completions[own].sum()),
        )

    def chosen(self, row: int | None, num_random: int | None, longest: bool) -> list[ShownExample]:
        """Examples by number, at random, the longest, or else the first."""
        if row is not None:
            if not 1 <= row <= len(self):
                raise UsageError(f"--row {row}: {self.artifact.path} has examples 1 to {len(self):,}.")
            return [self.example(row)]
        if num_random is not None:
            numbers = random.sample(range(1, len(self) + 1), min(num_random, len(self)))
            return [self.example(number) for number in sorted(numbers)]
        return [self.example(self._longest() if longest else 1)]

    def example(self, number: int) -> ShownExample:
        """Example `number`; counts from 1, the training split before the held-out one."""
        start = int(self._starts[number - 1])
        end = int(self._starts[number]) if number < len(self) else self._table.num_rows
        rows = self._table.slice(start, end - start).to_pylist()
        first = rows[0]
        mode = self.artifact.manifest["identity"]["prepare"]["truncation_mode"]
        return ShownExample(
            number,
            "train" if start < self._num_train_rows else "held out",
            first["source"],
            len(first["prompt_ids"]),
            first["prompt_cut"],
            mode == "keep_end",
            Span("prompt", self._texts.of(first["prompt_ids"])),
            [self._completion(row) for row in rows if row["role"] != "mismatched"],
        )

    def _completion(self, row: Mapping[str, Any]) -> ShownCompletion:
        ids, mask = row["completion_ids"], row["completion_mask"]
        edges = [0, *(at for at in range(1, len(ids)) if mask[at] != mask[at - 1]), len(ids)]
        spans = [
            Span("trained" if mask[start] else "masked", self._texts.of(ids[start:end]))
            for start, end in pairwise(edges)
            if start < end
        ]
        return ShownCompletion(row["role"], row["score"], len(ids), sum(mask), row["completion_cut"], spans)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt with its longest completion."""
        return int(self._sizes().max())

    def _longest(self) -> int:
        return int(self._sizes().argmax()) + 1

    def _sizes(self) -> np.ndarray:
        """For each example the tokens of its prompt and its longest completion."""
        completions = np.maximum.reduceat(self._lengths["completion_ids"], self._starts)
        return self._lengths["prompt_ids"][self._starts] + completions


def _starts(table: pa.Table) -> np.ndarray:
    """The first row of each example. Equal examples have equal ids, so the source must agree too."""
    names = list(zip(table.column("example_id").to_pylist(), table.column("source").to_pylist(), strict=True))
    return np.array([row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]])


def _sums(column: pa.ChunkedArray) -> np.ndarray:
    """The number of true values in each list of the column."""
    sums = []
    for chunk in column.chunks:
        flat = np.concatenate([[0], np.cumsum(chunk.values.to_numpy(zero_copy_only=False), dtype=np.int64)])
        offsets = chunk.offsets.to_numpy()
        sums.append(flat[offsets[1:]] - flat[offsets[:-1]])
    return np.concatenate(sums)
