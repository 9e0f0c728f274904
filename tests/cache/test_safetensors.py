"""The content of weights as a fingerprint, checked against sums made another way."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache.errors import DataError
from cache.safetensors import weights_fingerprint

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c.bias": torch.zeros(3, dtype=torch.float32),
}


@pytest.fixture
def model(tmp_path):
    """Writes tensors as safetensors files of a folder, given as {file name: tensor names}; several with an index."""

    def write(folder, layout, tensors=TENSORS):
        (tmp_path / folder).mkdir()
        for name, members in layout.items():
            save_file(
                {member: tensors[member] for member in members},
                tmp_path / folder / f"{name}.safetensors",
                {"format": "pt", "file": name},
            )
        if len(layout) > 1:
            files = {member: f"{name}.safetensors" for name, members in layout.items() for member in members}
            index = {"metadata": {}, "weight_map": files}
            (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
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
    assert model("other_names", {"mine": ["a.weight"], "weights": ["b.weight", "c.bias"]}) == whole
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
