"""The data that flows: rows, examples, and their Arrow form.

A *row* is one prompt with one completion, tokenized and masked. An *example* is the rows that share
one prompt; its rows are contiguous and never split over shards. Pairs, unpaired feedback, ranked
lists and KTO's mismatched completions are all examples. A *mismatch group* is a short run of examples in which
each example's completions serve as the mismatched rows of another, with another prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.artifacts import Artifact
from cache.fingerprint import ROW_KEY_BYTES, row_key
from cache.row_keys import RowKeys

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
    """The rows of one split, addressed by row number; examples are ranges of rows.

    Token ids, masks, sources and ids of examples stay in the memory-mapped shards, and are read when they are asked for.
    """

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        """`tables` are the shards of a split, in order."""
        table = pa.concat_tables([SCHEMA.empty_table(), *tables])
        self.keys = RowKeys.of_column(table.column("row_key"))
        self.roles = _roles(table.column("role"))
        self.scores = table.column("score").to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
        self.weights = table.column("weight").to_numpy().astype(np.float32, copy=False)
        self.sources: Sequence[str] = _Texts(table.column("source"))
        self.example_ids: Sequence[str] = _Texts(table.column("example_id"))
        self._prompts = _Ragged(table.column("prompt_ids"))
        self._completions = _Ragged(table.column("completion_ids"))
        self._masks = _Ragged(table.column("completion_mask"))
        self.prompt_lengths = self._prompts.lengths
        self.completion_lengths = self._completions.lengths
        # Two copies of an example have one id; their sources keep them apart.
        changes = _changes(table.column("example_id")) | _changes(table.column("source"))
        self.starts = np.flatnonzero(changes).astype(np.int64)
        self.ends = np.append(self.starts[1:], len(changes))[: len(self.starts)].astype(np.int64)
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
        for values in (*self._prompts.flats(), *self._completions.flats()):
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

    def scored_keys(self, with_mismatched: bool) -> RowKeys:
        """Keys of the rows that a loss scores: all, or all but the mismatched ones."""
        return self.keys if with_mismatched else self.keys.only(self.roles != "mismatched")

    def max_length(self) -> int:
        """Tokens in the longest prompt and completion together."""
        return int((self.prompt_lengths + self.completion_lengths).max()) if len(self) else 0


class _Ragged:
    """A list column: the values of each shard, and the length of each row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._begins = np.cumsum([0, *map(len, self._chunks)])
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in self._chunks]
        self.lengths = np.concatenate([np.zeros(0, np.int32), *lengths])

    def flats(self) -> Iterator[np.ndarray]:
        """The values of each shard's rows."""
        return (chunk.flatten().to_numpy() for chunk in self._chunks)

    def __getitem__(self, row: int) -> np.ndarray:
        """The values of one row; bits of a mask become 0 and 1."""
        shard = int(np.searchsorted(self._begins, row, side="right")) - 1
        values = self._chunks[shard][int(row - self._begins[shard])].values
        return (values.cast(pa.uint8()) if pa.types.is_boolean(values.type) else values).to_numpy()


class _Texts(Sequence[str]):
    """A column of texts, of which one is read when it is asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        return self._column[int(row)].as_py()


def _roles(column: pa.ChunkedArray) -> np.ndarray:
    """The column of roles, dtype object: of each role one object."""
    places = pc.call_function("index_in", [column], pc.SetLookupOptions(pa.array(ROLES))).to_numpy()
    return np.array(ROLES, dtype=object)[places]


def _changes(column: pa.ChunkedArray) -> np.ndarray:
    """For each row whether its value differs from that of the row before, bool."""
    changed = np.ones(len(column), bool)
    if len(column) > 1:
        changed[1:] = pc.call_function(
            "not_equal", [column.slice(1), column.slice(0, len(column) - 1)]
        ).to_numpy()
    return changed


def distinct_ids(row_sets: Iterable[RowSet]) -> np.ndarray:
    """Every token id in any of these rows once, ascending, int64."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(rows.token_ids() for rows in row_sets)]))
