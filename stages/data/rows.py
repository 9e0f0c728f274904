"""The data that flows: rows, examples, and their Arrow form.

A *row* is one prompt with one completion, tokenized and masked. An *example* is the rows that share
one prompt; its rows are contiguous and never split over shards. Pairs, unpaired feedback, ranked
lists and KTO's mismatched completions are all examples. A *mismatch group* is a short run of examples in which
each example's completions serve as the mismatched rows of another, with another prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cache.artifacts import Artifact
from cache.fingerprint import ROW_KEY_BYTES, row_key

ROLES = ("chosen", "rejected", "desirable", "undesirable", "ranked", "mismatched")
SPLITS = ("train", "heldout")
SCHEMA = pa.schema(
    [
        ("row_key", pa.binary(ROW_KEY_BYTES)),
        ("example_id", pa.string()),
        ("role", pa.string()),
        ("score", pa.float64()),
        ("weight", pa.float32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("source", pa.string()),
        ("cycle", pa.int32()),  # the mismatch group
        ("prompt_cut", pa.int32()),
        ("completion_cut", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One completion of an example's prompt: token ids (int32) and completion mask (bool), one entry per token.

    `cut` is the number of tokens that truncation took from its end.
    """

    role: str
    ids: np.ndarray
    mask: np.ndarray
    score: float | None = None
    weight: float = 1.0
    cut: int = 0


@dataclass
class Example:
    """Rows that share `prompt_ids`; `source` is the location it was read from, e.g. `pairs.jsonl:17`.

    `prompt_cut` is the number of tokens that truncation took from the prompt.
    """

    example_id: str
    source: str
    prompt_ids: np.ndarray
    rows: list[Row] = field(default_factory=list)
    prompt_cut: int = 0


def to_table(examples: Sequence[Example], groups: Sequence[int]) -> pa.Table:
    """The Arrow table of `examples`; `groups` has the number of each example's mismatch group."""
    flat = [
        (example, row, group) for example, group in zip(examples, groups, strict=True) for row in example.rows
    ]
    columns = [
        pa.array(
            [row_key(example.prompt_ids, row.ids) for example, row, _ in flat], type=pa.binary(ROW_KEY_BYTES)
        ),
        pa.array([example.example_id for example, _, _ in flat], type=pa.string()),
        pa.array([row.role for _, row, _ in flat], type=pa.string()),
        pa.array([row.score for _, row, _ in flat], type=pa.float64()),
        pa.array([row.weight for _, row, _ in flat], type=pa.float32()),
        _lists([example.prompt_ids for example, _, _ in flat], np.int32),
        _lists([row.ids for _, row, _ in flat], np.int32),
        _lists([row.mask for _, row, _ in flat], np.bool_),
        pa.array([example.source for example, _, _ in flat], type=pa.string()),
        pa.array([group for _, _, group in flat], type=pa.int32()),
        pa.array([example.prompt_cut for example, _, _ in flat], type=pa.int32()),
        pa.array([row.cut for _, row, _ in flat], type=pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _lists(arrays: Sequence[np.ndarray], dtype: type) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(values) for values in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(dtype)))


class RowSet:
    """The rows of one split in memory, addressed by row number; examples are ranges of rows."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        """`tables` are the shards of a split, in order."""
        table = pa.concat_tables([SCHEMA.empty_table(), *tables])
        self.keys: list[bytes] = table.column("row_key").to_pylist()
        self.roles = np.array(table.column("role").to_pylist(), dtype="U12")
        self.scores = table.column("score").to_numpy(zero_copy_only=False).astype(np.float64)
        self.weights = table.column("weight").to_numpy().astype(np.float32)
        self.sources: list[str] = table.column("source").to_pylist()
        self.example_ids: list[str] = table.column("example_id").to_pylist()
        self._prompts = _Ragged(table.column("prompt_ids"), pa.int32())
        self._completions = _Ragged(table.column("completion_ids"), pa.int32())
        self._masks = _Ragged(table.column("completion_mask"), pa.uint8())
        self.prompt_lengths = self._prompts.lengths
        self.completion_lengths = self._completions.lengths
        # Two copies of an example have one id; their sources keep them apart.
        names = list(zip(self.example_ids, self.sources, strict=True))
        changes = [row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]]
        self.starts = np.array(changes, dtype=np.int64)
        self.ends = np.array([*changes[1:], len(names)][: len(changes)], dtype=np.int64)
        self.mismatch_groups = table.column("cycle").to_numpy()[self.starts]

    @classmethod
    def of(cls, artifact: Artifact, split: str) -> "RowSet":
        """Read one split of a rows artifact, checking every shard."""
        return cls(artifact.shards(f"{split}-"))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.keys)

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.starts)

    def token_ids(self) -> np.ndarray:
        """Every token id in the rows once, ascending, int64."""
        present = np.zeros(0, bool)
        for values in (self._prompts.flat, self._completions.flat):
            longer = np.zeros(max(len(present), int(values.max(initial=-1)) + 1), bool)
            longer[: len(present)] = present
            longer[values] = True
            present = longer
        return np.flatnonzero(present)

    def prompt(self, row: int) -> np.ndarray:
        """Prompt token ids of a row, int32."""
        return self._prompts[row]

    def completion(self, row: int) -> np.ndarray:
        """Completion token ids of a row, int32."""
        return self._completions[row]

    def mask(self, row: int) -> np.ndarray:
        """Completion mask of a row, uint8: 1 where the token is trained."""
        return self._masks[row]

    def example_rows(self, example: int, mismatched: bool) -> np.ndarray:
        """Row numbers of an example: its mismatched rows, or all but these."""
        rows = np.arange(self.starts[example], self.ends[example])
        return rows[(self.roles[rows] == "mismatched") == mismatched]

    def example_of(self, numbers: np.ndarray) -> np.ndarray:
        """Example number of each of these row numbers."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def scored_keys(self, with_mismatched: bool) -> list[bytes]:
        """Keys of the rows that a loss scores: all, or all but the mismatched ones."""
        return [
            key
            for key, role in zip(self.keys, self.roles, strict=True)
            if with_mismatched or role != "mismatched"
        ]

    def max_length(self) -> int:
        """Tokens in the longest prompt and completion together."""
        return int((self.prompt_lengths + self.completion_lengths).max()) if len(self) else 0


class _Ragged:
    """A list column as one flat array and offsets."""

    def __init__(self, column: pa.ChunkedArray, dtype: pa.DataType) -> None:
        joined = column.cast(pa.large_list(dtype)).combine_chunks()
        array = joined if isinstance(joined, pa.Array) else joined.chunk(0)
        self._offsets = array.offsets.to_numpy()
        self.flat = array.values.to_numpy(zero_copy_only=False)
        self.lengths = np.diff(self._offsets)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self._offsets[row] : self._offsets[row + 1]]


def distinct_ids(row_sets: Iterable[RowSet]) -> np.ndarray:
    """Every token id in any of these rows once, ascending, int64."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(rows.token_ids() for rows in row_sets)]))
