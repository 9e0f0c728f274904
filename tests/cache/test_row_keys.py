"""The index of keys finds what a dict finds."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.row_keys import KeyIndex, RowKeys

# Of few bytes, so that keys repeat and share their first half.
keys = st.lists(st.tuples(st.sampled_from(b"ab"), st.sampled_from(b"\x00\x01\xff")), max_size=12).map(
    lambda parts: [bytes([first]) * 8 + bytes([second]) * 8 for first, second in parts]
)


@pytest.mark.slow
@given(keys, keys)
def test_an_index_is_a_dict_of_the_last_place(held, asked):
    places = {key: place for place, key in enumerate(held)}
    index = KeyIndex(RowKeys.of(held))
    assert index.num_distinct == len(places)
    assert index.find(RowKeys.of(asked)).tolist() == [places.get(key, -1) for key in asked]


@given(keys)
def test_the_first_of_equal_keys(held):
    expected = [key not in held[:place] for place, key in enumerate(held)]
    assert RowKeys.of(held).is_first().tolist() == expected


@pytest.mark.slow
@given(keys, st.integers(1, 4))
def test_keys_of_a_column_are_its_bytes_however_it_is_cut(held, per_chunk):
    chunks = [held[begin : begin + per_chunk] for begin in range(0, len(held), per_chunk)]
    column = pa.chunked_array([pa.array(chunk, pa.binary(16)) for chunk in chunks], pa.binary(16))
    assert list(RowKeys.of_column(column)) == held
    assert list(RowKeys.of_column(column.slice(1))) == held[1:]
    assert [RowKeys.of_column(column)[place] for place in range(len(held))] == held


def test_random_keys_are_found_among_many():
    drawn = np.random.default_rng(0).bytes(16 * 20_000)
    held = RowKeys.of(drawn[begin : begin + 16] for begin in range(0, len(drawn), 16))
    index = KeyIndex(held.only(np.arange(0, 20_000, 2)))
    found = index.find(held)
    assert (found[::2] == np.arange(10_000)).all()
    assert (found[1::2] == -1).all()


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"multiple|reshape"):
        RowKeys.of([b"short"])
