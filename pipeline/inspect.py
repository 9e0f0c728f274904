"""What is in a rows artifact: lengths, cuts and shares of all of it, and single examples token by token.

In: a finished `rows` artifact and the tokenizer it was made with. Out: plain data, which
`inspect_terminal.py` and `inspect_page.py` show to a person.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.artifacts import MANIFEST, Artifact, open_artifact
from cache.errors import StaleError, UsageError
from stages.data.rows import SPLITS
from stages.models.loading import ModelSource, load_tokenizer

STEPS = (1, 2, 5)
MAX_BINS = 12
INVISIBLE = {0x7F: "␡", **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}}
# Texts of one token may end inside a character; this many tokens are enough for any.
MAX_TOKENS_OF_A_CHARACTER = 8


@dataclass(frozen=True)
class Token:
    """One token, or the few that make one character; `text` holds nothing a terminal would obey."""

    text: str
    ids: tuple[int, ...]
    is_special: bool


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one part: 'prompt', 'kept' or 'masked'."""

    part: str
    tokens: list[Token]


@dataclass(frozen=True)
class Completion:
    """One completion of an example; `cut` tokens are missing at its end."""

    role: str
    score: float | None
    num_tokens: int
    num_trained: int
    cut: int
    spans: list[Span]


@dataclass(frozen=True)
class Shown:
    """One example; `prompt_cut` tokens are missing at the start of its prompt, or at its end."""

    number: int
    split: str
    source: str
    num_prompt_tokens: int
    prompt_cut: int
    cut_at_start: bool
    prompt: Span
    completions: list[Completion]


@dataclass(frozen=True)
class Histogram:
    """How many prompts or completions have how many tokens: `(first, last, count)` for each bin."""

    name: str
    bins: list[tuple[int, int, int]]
    median: int
    p90: int
    longest: int


@dataclass(frozen=True)
class Overview:
    """The whole artifact in numbers."""

    folder: Path
    counts: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokenizer: str
    histograms: list[Histogram]
    tokens: int
    trained_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "artifact": str(self.folder),
            "tokens": self.tokens,
            "completion_tokens": self.completion_tokens,
            "trained_tokens": self.trained_tokens,
            "cuts": self.counts["cuts"],
            "lengths": {
                entry.name: {
                    "median": entry.median,
                    "p90": entry.p90,
                    "max": entry.longest,
                    "bins": entry.bins,
                }
                for entry in self.histograms
            },
        }


def open_rows(folder: Path, tokenizer: Path | None = None) -> "Rows":
    """The rows artifact in `folder`, read with the tokenizer that its manifest names or with `tokenizer`.

    Raises `UsageError` or `StaleError` when one of them is something else.
    """
    if not folder.is_dir():
        raise UsageError(f"No such artifact: {folder}. Give a folder under artifacts/rows, or none at all.")
    if not (folder / MANIFEST).is_file():  # perhaps a whole store, which nobody is to be told to delete
        raise UsageError(
            f"{folder} is no artifact: it has no {MANIFEST}. Give a folder under artifacts/rows, or none at all."
        )
    artifact = open_artifact(folder)
    if artifact.manifest["stage"] != "prepare":
        raise UsageError(
            f"{folder} was written by `align {artifact.manifest['stage']}`. Give a folder that `align prepare` wrote."
        )
    tokenizer = tokenizer or Path(artifact.manifest["provenance"]["tokenizer"])
    if not tokenizer.is_dir():
        raise UsageError(
            f"No tokenizer in {tokenizer}: no such folder. Say where that of {folder} is with --tokenizer DIR."
        )
    return Rows(artifact, load_tokenizer(ModelSource(str(tokenizer), tokenizer)))


class Rows:
    """A rows artifact, opened to be looked at."""

    def __init__(self, artifact: Artifact, tokenizer: Any) -> None:
        """Check every shard, and that `tokenizer` is the one whose ids they hold."""
        import hashlib

        backend = tokenizer.backend_tokenizer
        expected = artifact.manifest["identity"]["template"]["tokenizer"]
        if hashlib.sha256(backend.to_str().encode()).hexdigest() != expected:
            raise StaleError(
                f"The tokenizer in {tokenizer.name_or_path} is not the one {artifact.path} was made with. Name the right one with --tokenizer DIR."
            )
        self.artifact = artifact
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        tables = {split: artifact.shards(f"{split}-") for split in SPLITS}
        self._table = pa.concat_tables([table for split in SPLITS for table in tables[split]])
        self._num_train_rows = sum(table.num_rows for table in tables["train"])
        self._starts = _starts(self._table)
        self._lengths = {
            column: pc.call_function("list_value_length", [self._table.column(column)]).to_numpy()
            for column in ("prompt_ids", "completion_ids")
        }

    def __len__(self) -> int:
        """Number of examples, in both splits."""
        return len(self._starts)

    def overview(self) -> Overview:
        """Lengths, cuts and shares; mismatched rows do not count, as they repeat the others."""
        roles = self._table.column("role").to_numpy(zero_copy_only=False)
        own = roles != "mismatched"
        prompts, completions = self._lengths["prompt_ids"], self._lengths["completion_ids"]
        trained = _sums(self._table.column("completion_mask"))
        histograms = [_histogram("prompts", prompts[self._starts])]
        histograms += [
            _histogram(role, completions[roles == role])
            for role in dict.fromkeys(roles)
            if role != "mismatched"
        ]
        manifest = self.artifact.manifest
        return Overview(
            self.artifact.path,
            self.artifact.counts,
            manifest["identity"]["prepare"],
            str(manifest["provenance"]["tokenizer"]),
            histograms,
            int(prompts[self._starts].sum() + completions[own].sum()),
            int(trained[own].sum()),
            int(completions[own].sum()),
        )

    def chosen(self, row: int | None, num_random: int | None, longest: bool) -> list[Shown]:
        """The examples a command line asks for: by number, at random, the longest, or else the first."""
        if row is not None:
            if not 1 <= row <= len(self):
                raise UsageError(f"--row {row}: the artifact holds rows 1 to {len(self):,}.")
            return [self.example(row)]
        if num_random is not None:
            numbers = random.sample(range(1, len(self) + 1), min(num_random, len(self)))
            return [self.example(number) for number in sorted(numbers)]
        return [self.example(self._longest() if longest else 1)]

    def example(self, number: int) -> Shown:
        """Example `number`, counted from 1 over the training split and then the held-out one."""
        start = int(self._starts[number - 1])
        end = int(self._starts[number]) if number < len(self) else self._table.num_rows
        rows = self._table.slice(start, end - start).to_pylist()
        first = rows[0]
        mode = self.artifact.manifest["identity"]["prepare"]["truncation_mode"]
        return Shown(
            number,
            "train" if start < self._num_train_rows else "held out",
            first["source"],
            len(first["prompt_ids"]),
            first["prompt_cut"],
            mode == "keep_end",
            Span("prompt", self._tokens(first["prompt_ids"])),
            [self._completion(row) for row in rows if row["role"] != "mismatched"],
        )

    def _completion(self, row: Mapping[str, Any]) -> Completion:
        ids, mask = row["completion_ids"], row["completion_mask"]
        edges = [0, *(at for at in range(1, len(ids)) if mask[at] != mask[at - 1]), len(ids)]
        spans = [
            Span("kept" if mask[start] else "masked", self._tokens(ids[start:end]))
            for start, end in pairwise(edges)
            if start < end
        ]
        return Completion(row["role"], row["score"], len(ids), sum(mask), row["completion_cut"], spans)

    def _longest(self) -> int:
        sizes = self._lengths["prompt_ids"][self._starts] + np.maximum.reduceat(
            self._lengths["completion_ids"], self._starts
        )
        return int(sizes.argmax()) + 1

    def _tokens(self, ids: Sequence[int]) -> list[Token]:
        """Tokens whose texts together are the decoded text; those that share a character are one."""
        decode = self._tokenizer.backend_tokenizer.decode
        found: list[Token] = []
        before: list[int] = []
        group: list[int] = []
        for place, number in enumerate(ids):
            group.append(number)
            # Some decoders drop a leading blank, so that a text is what a token adds to the one before it.
            known = decode(before, skip_special_tokens=False) if before else ""
            text = decode(before + group, skip_special_tokens=False)[len(known) :]
            is_open = text.endswith("\ufffd") and len(group) < MAX_TOKENS_OF_A_CHARACTER
            if is_open and place + 1 < len(ids):
                continue
            found.append(Token(_visible(text), tuple(group), number in self._special))
            before, group = group, []
        return found


def _starts(table: pa.Table) -> np.ndarray:
    """The first row of each example; copies of one example have different sources."""
    names = list(zip(table.column("example_id").to_pylist(), table.column("source").to_pylist(), strict=True))
    return np.array([row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]])


def _sums(column: pa.ChunkedArray) -> np.ndarray:
    """The number of true values in each list."""
    sums = []
    for chunk in column.chunks:
        flat = np.concatenate([[0], np.cumsum(chunk.values.to_numpy(zero_copy_only=False), dtype=np.int64)])
        offsets = chunk.offsets.to_numpy()
        sums.append(flat[offsets[1:]] - flat[offsets[:-1]])
    return np.concatenate(sums)


def _histogram(name: str, lengths: np.ndarray) -> Histogram:
    longest = int(lengths.max())
    width = next(
        step * 10**power for power in range(12) for step in STEPS if longest <= step * 10**power * MAX_BINS
    )
    counts = np.bincount((lengths - 1).clip(0) // width)
    first = int(counts.nonzero()[0][0])
    bins = [
        (index * width + 1, (index + 1) * width, int(counts[index])) for index in range(first, len(counts))
    ]
    median, p90 = (int(value) for value in np.percentile(lengths, (50, 90)))
    return Histogram(name, bins, median, p90, longest)


def _visible(text: str) -> str:
    """Text with every character that has no picture of its own replaced by one that has."""
    return "".join(
        letter
        if letter in "\n\t" or letter.isprintable()
        else INVISIBLE.get(ord(letter), f"⟨U+{ord(letter):04X}⟩")
        for letter in text
    )
