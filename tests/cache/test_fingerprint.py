"""Identity: canonical JSON and row keys, checked against sums made another way."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.fingerprint import canonical_json, differing_fields, fingerprint, row_key


def ids(*values):
    return np.array(values, dtype=np.int32)


def test_row_key_is_the_hash_of_length_and_little_endian_ids():
    """Prompt [1, 258], completion [3]: 8 bytes of length, then 4 bytes for each id, lowest byte first."""
    content = bytes([2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0])
    assert row_key(ids(1, 258), ids(3)) == hashlib.blake2b(content, digest_size=16).digest()


def test_row_key_depends_on_values_alone():
    wide = np.array([9, 1, 258, 9], dtype=">i8")[1:3]
    assert row_key(wide, np.array([3, 4])[:1]) == row_key(ids(1, 258), ids(3))


token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=4)


@pytest.mark.slow
@given(token_lists, token_lists, token_lists, token_lists)
def test_row_keys_differ_wherever_prompt_or_completion_differ(prompt, completion, other_prompt, other):
    same_key = row_key(ids(*prompt), ids(*completion)) == row_key(ids(*other_prompt), ids(*other))
    assert same_key == ((prompt, completion) == (other_prompt, other))


def test_moving_the_cut_between_prompt_and_completion_moves_the_key():
    assert row_key(ids(1), ids(2, 3)) != row_key(ids(1, 2), ids(3))


def test_canonical_json_ignores_the_order_of_keys_and_keeps_text_as_utf_8():
    assert canonical_json({"b": [1, 0.5], "a": "é\n"}) == '{"a":"é\\n","b":[1,0.5]}'.encode()
    assert fingerprint({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_what_is_no_number(number):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"beta": number})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé\n"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@given(json_values)
def test_canonical_json_loses_nothing(value):
    assert json.loads(canonical_json(value)) == value


@pytest.mark.slow
@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), json_values, max_size=3), json_values)
def test_differing_fields_names_the_one_field_that_was_changed(identity, value):
    changed = {**identity, "field": {"inner": value}}
    assert differing_fields(changed, changed) == []
    lines = differing_fields(changed, {**changed, "field": {"inner": [value]}})
    assert len(lines) == 1
    assert lines[0].startswith("field.inner: ")


def test_differing_fields_shows_both_values_and_missing_ones():
    lines = differing_fields({"dtype": "float32", "gone": 1}, {"dtype": "bfloat16", "new": None, "x": "y"})
    assert lines == ["dtype: float32 -> bfloat16", "gone: 1 -> null", "x: null -> y"]
