"""Identity: canonical JSON, row keys and the content of weights, checked against sums made another way."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cache.errors import DataError
from cache.fingerprint import canonical_json, differing_fields, fingerprint, row_key, weights_fingerprint

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c.bias": torch.zeros(3, dtype=torch.float32),
}


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


@given(json_values)
def test_canonical_json_loses_nothing(value):
    assert json.loads(canonical_json(value)) == value


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


@pytest.fixture
def model(tmp_path):
    """Writes tensors as safetensors files of a folder, given as {file name: tensor names}."""

    def write(folder, layout, tensors=TENSORS):
        (tmp_path / folder).mkdir()
        for name, members in layout.items():
            save_file(
                {member: tensors[member] for member in members},
                tmp_path / folder / f"{name}.safetensors",
                {"format": "pt", "file": name},
            )
        return weights_fingerprint(tmp_path / folder)

    return write


def test_weights_fingerprint_known_answer(model):
    """For each tensor in name order: the JSON of name, dtype and shape, then its little-endian bytes."""
    content = b'["a.weight","F32",[2,3]]' + np.arange(6, dtype="<f4").tobytes()
    content += b'["b.weight","BF16",[4]]' + bytes([0x80, 0x3F] * 4)
    content += b'["c.bias","F32",[3]]' + bytes(12)
    assert model("whole", {"model": TENSORS}) == hashlib.sha256(content).hexdigest()


def test_weights_fingerprint_ignores_how_tensors_are_spread_over_files(model):
    whole = model("whole", {"model": TENSORS})
    assert model("renamed", {"weights-of-mine": TENSORS}) == whole
    assert model("sharded", {"model-2": ["a.weight"], "model-1": ["c.bias", "b.weight"]}) == whole


def test_weights_fingerprint_notices_every_change_of_content(model):
    element = TENSORS["a.weight"].clone()
    element[1, 2] = torch.nextafter(element[1, 2], torch.tensor(10.0))
    changes = {
        "element": {**TENSORS, "a.weight": element},
        "dtype": {**TENSORS, "c.bias": torch.zeros(3, dtype=torch.int32)},
        "shape": {**TENSORS, "a.weight": TENSORS["a.weight"].reshape(3, 2)},
        "name": {
            **{key: value for key, value in TENSORS.items() if key != "c.bias"},
            "d.bias": TENSORS["c.bias"],
        },
        "missing": {key: value for key, value in TENSORS.items() if key != "c.bias"},
    }
    found = {name: model(name, {"model": tensors}, tensors) for name, tensors in changes.items()}
    assert len({model("same", {"model": TENSORS}), *found.values()}) == len(changes) + 1


def test_a_folder_without_weights_says_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"no")
    with pytest.raises(DataError, match=r"holds no \.safetensors weights.*save_pretrained"):
        weights_fingerprint(tmp_path)


def test_a_damaged_weights_file_is_a_data_error_at_every_length(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"model\.safetensors"):
            weights_fingerprint(tmp_path)


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"\xff", b"[" * 100_000]
)
def test_a_header_that_is_no_safetensors_header_is_a_data_error(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(DataError, match="is not a safetensors file"):
        weights_fingerprint(tmp_path)


def test_a_header_length_beyond_the_file_is_a_data_error(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="is not a safetensors file"):
        weights_fingerprint(tmp_path)
