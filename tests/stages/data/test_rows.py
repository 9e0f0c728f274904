"""Examples to Arrow and back: nothing changes, examples stay whole, and copies stay apart."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.fingerprint import row_key
from stages.data.rows import ROLES, SCHEMA, Example, Row, RowSet, to_table

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)


def array(values, dtype=np.int32):
    return np.array(values, dtype=dtype)


@st.composite
def rows(draw):
    tokens = draw(ids)
    mask = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    score = draw(st.none() | st.floats(allow_nan=False, allow_infinity=False))
    return Row(
        draw(st.sampled_from(ROLES)), array(tokens), array(mask, bool), score, draw(st.floats(0, 4, width=16))
    )


@st.composite
def example_lists(draw):
    """Examples of one to three rows; ids repeat, as they do for copies, but never with one source."""
    count = draw(st.integers(0, 6))
    return [
        Example(
            draw(st.sampled_from("ab")),
            f"x:{number}",
            array(draw(ids)),
            draw(st.lists(rows(), min_size=1, max_size=3)),
        )
        for number in range(count)
    ]


@pytest.mark.slow
@given(example_lists(), st.integers(1, 4))
def test_examples_survive_whatever_the_shards(examples, per_shard):
    cycles = [number // 2 for number in range(len(examples))]
    shards = [
        to_table(examples[begin : begin + per_shard], cycles[begin : begin + per_shard])
        for begin in range(0, len(examples), per_shard)
    ]
    row_set = RowSet(shards)
    assert row_set.num_examples == len(examples)
    assert len(row_set) == sum(len(example.rows) for example in examples)
    assert row_set.mismatch_groups.tolist() == cycles
    for number, example in enumerate(examples):
        numbers = range(row_set.starts[number], row_set.ends[number])
        for row, expected in zip(numbers, example.rows, strict=True):
            assert row_set.prompt(row).tolist() == example.prompt_ids.tolist()
            assert row_set.completion(row).tolist() == expected.ids.tolist()
            assert row_set.mask(row).tolist() == expected.mask.tolist()
            assert row_set.keys[row] == row_key(example.prompt_ids, expected.ids)
            assert (row_set.roles[row], row_set.sources[row]) == (expected.role, example.source)
            assert row_set.weights[row] == expected.weight
            score = row_set.scores[row]
            assert score == expected.score or (np.isnan(score) and expected.score is None)
            lengths = row_set.prompt_lengths[row], row_set.completion_lengths[row]
            assert lengths == (len(example.prompt_ids), len(expected.ids))
        mismatched = row_set.example_rows(number, mismatched=True)
        assert [row_set.roles[row] for row in mismatched] == ["mismatched"] * len(mismatched)
        assert sorted([*mismatched, *row_set.example_rows(number, mismatched=False)]) == list(numbers)


def test_a_split_without_rows():
    for tables in ([], [to_table([], [])]):
        row_set = RowSet(tables)
        assert (len(row_set), row_set.num_examples, row_set.max_length()) == (0, 0, 0)


def test_the_longest_row():
    example = Example("a", "x:1", array([1, 2, 3]), [Row("chosen", array([4]), array([True], bool))])
    longer = Example("b", "x:2", array([1]), [Row("chosen", array([4, 5, 6, 7]), array([True] * 4, bool))])
    assert RowSet([to_table([example, longer], [0, 0])]).max_length() == 5


def test_the_schema_is_what_readers_of_an_artifact_rely_on():
    example = Example("a", "x:1", array([1]), [Row("chosen", array([2]), array([True], bool))])
    assert to_table([example], [0]).schema == SCHEMA
    assert SCHEMA.field("prompt_ids").type == pa.list_(pa.int32())
