"""What a full disk and a lack of memory look like in each library, as one line."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from cache.errors import CorruptError, MachineError
from stages.runtime.limits import using_memory, writing
from tests.full_disk import full_disk

TENSORS = {"weight": torch.zeros(100_000)}
TOO_MANY = 1 << 46
WRITERS = {
    "python": lambda path: path.write_bytes(bytes(400_000)),
    "torch": lambda path: torch.save(TENSORS, path),
    "safetensors": lambda path: save_file(TENSORS, path),
    "tokenizers": lambda path: Tokenizer(
        models.WordLevel({f"word number {number}": number for number in range(10_000)}, "word number 0")
    ).save(str(path)),
}
ALLOCATORS = {
    "python": lambda: bytearray(TOO_MANY << 4),
    "torch": lambda: torch.empty(TOO_MANY),
    "numpy": lambda: np.empty(TOO_MANY),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_names_the_file_and_the_reason(library, tmp_path):
    path = tmp_path / "file"
    with (
        full_disk(10_000),
        pytest.raises(MachineError, match=rf"^Cannot write {path}: \w+.*same command again"),
        writing(path),
    ):
        WRITERS[library](path)
    with writing(path):
        WRITERS[library](path)


@pytest.mark.parametrize("library", ALLOCATORS)
def test_a_lack_of_memory_says_what_to_type(library):
    said = r"^Out of memory \(.+\)\. Lower it\.$"
    with pytest.raises(MachineError, match=said), using_memory("Lower it."):
        ALLOCATORS[library]()


def test_the_words_of_a_gpu_are_a_lack_of_memory_too():
    with pytest.raises(MachineError, match="CUDA out of memory"), using_memory("Lower it."):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), ValueError("not JSON"), CorruptError("damaged"), KeyError("name")],
)
def test_any_other_error_stays_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as caught, writing(tmp_path), using_memory("Lower it."):
        raise error
    assert caught.value is error
