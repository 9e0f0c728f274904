"""The fingerprint of a model is that of the tensors transformers loads from its folder, whatever lies beside them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cache.errors import DataError, MachineError
from cache.safetensors import INDEX, WHOLE, weight_files, weights_fingerprint
from stages.generation.vllm_process import check_weight_files

Tensors = dict[str, torch.Tensor]
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def changed(tensors: Tensors) -> Tensors:
    return {name: value + 1 for name, value in tensors.items()}


def write(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path, {"format": "pt"})


def write_sharded(folder: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    halves = dict(zip(PARTS, (names[::2], names[1::2]), strict=True))
    for part, members in halves.items():
        write(folder / part, {name: tensors[name] for name in members})
    map_ = {name: part for part, members in halves.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": map_}))


def set_in_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def beside_whole(folder: Path, tensors: Tensors) -> None:
    """Files of other names, whose tensors come after those of model.safetensors in name order, and before."""
    write(folder / WHOLE, tensors)
    for name in ("model.safetensors.bak.safetensors", "other.safetensors", "consolidated.safetensors"):
        write(folder / name, changed(tensors))


def bin_beside_whole(folder: Path, tensors: Tensors) -> None:
    write(folder / WHOLE, tensors)
    torch.save(changed(tensors), folder / "pytorch_model.bin")


def consolidated_beside_shards(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors)
    write(folder / "consolidated.safetensors", changed(tensors))
    torch.save(changed(tensors), folder / "pytorch_model.bin")


def named_in_config(folder: Path, tensors: Tensors) -> None:
    write(folder / "mine.safetensors", tensors)
    write(folder / WHOLE, changed(tensors))
    set_in_config(folder, transformers_weights="mine.safetensors")


def index_named_in_config(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors)
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    write(folder / WHOLE, changed(tensors))
    set_in_config(folder, transformers_weights="mine.safetensors.index.json")


def index_of_the_whole(folder: Path, tensors: Tensors) -> None:
    write(folder / WHOLE, tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, WHOLE)}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A model folder without weights."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / WHOLE).unlink()
    return tmp_path / "model"


@pytest.mark.parametrize(
    "layout",
    [
        beside_whole,
        bin_beside_whole,
        write_sharded,
        consolidated_beside_shards,
        named_in_config,
        index_named_in_config,
        index_of_the_whole,
    ],
)
def test_the_fingerprint_is_of_the_tensors_that_transformers_loads(
    layout: Callable[[Path, Tensors], None], folder: Path, tiny_model: Path
) -> None:
    layout(folder, load_file(tiny_model / WHOLE))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    assert weights_fingerprint(folder) == weights_fingerprint(tiny_model)


def whole_and_other_shards(folder: Path, tensors: Tensors) -> None:
    write(folder / WHOLE, tensors)
    write_sharded(folder, changed(tensors))


def other_names_and_bin(folder: Path, tensors: Tensors) -> None:
    write(folder / "other.safetensors", tensors)
    torch.save(changed(tensors), folder / "pytorch_model.bin")


def tensor_in_two_shards(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors)
    write(folder / PARTS[1], changed(tensors))


def lost_shard(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors)
    (folder / PARTS[1]).unlink()


def outside(folder: Path, tensors: Tensors) -> None:
    write(folder.parent / "mine.safetensors", tensors)
    set_in_config(folder, transformers_weights="../mine.safetensors")


def adapter_inside(folder: Path, tensors: Tensors) -> None:
    write(folder / WHOLE, tensors)
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (whole_and_other_shards, rf"holds {WHOLE}, and an {INDEX} of other files"),
        (other_names_and_bin, r"holds no \.safetensors weights under a name that is loaded"),
        (tensor_in_two_shards, r"is in .*model-00001.* and in .*model-00002"),
        (lost_shard, rf"lists {PARTS[1]}, which is missing"),
        (outside, r"names \.\./mine\.safetensors, which is outside of"),
        (adapter_inside, r"holds a model and an adapter.*merge"),
    ],
)
def test_a_folder_that_loaders_read_differently_is_refused(
    layout: Callable[[Path, Tensors], None], message: str, folder: Path, tiny_model: Path
) -> None:
    layout(folder, load_file(tiny_model / WHOLE))
    with pytest.raises(DataError, match=message):
        weights_fingerprint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 7}}']
)
def test_an_index_that_is_none_is_a_data_error(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(DataError, match=INDEX):
        weight_files(folder)


@pytest.mark.parametrize("layout", [write_sharded, consolidated_beside_shards, index_of_the_whole])
def test_vllm_reads_the_same_files(
    layout: Callable[[Path, Tensors], None], folder: Path, tiny_model: Path
) -> None:
    layout(folder, load_file(tiny_model / WHOLE))
    check_weight_files(folder)


@pytest.mark.parametrize("layout", [beside_whole, named_in_config])
def test_vllm_is_not_started_where_it_would_read_other_files(
    layout: Callable[[Path, Tensors], None], folder: Path, tiny_model: Path
) -> None:
    layout(folder, load_file(tiny_model / WHOLE))
    with pytest.raises(
        MachineError, match=r"vLLM and transformers read different weights.*engine=transformers"
    ):
        check_weight_files(folder)
