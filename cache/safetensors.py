"""The content of a model's weights as one fingerprint, read from safetensors files without torch."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from cache.errors import DataError
from cache.fingerprint import canonical_json


@dataclass(frozen=True)
class _Entry:
    """The name, dtype and shape of a tensor, and where its bytes are in the file (`begin` to `end`)."""

    path: Path
    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def weights_fingerprint(folder: Path) -> str:
    """Hex sha256 over every tensor of a model folder: name, dtype, shape and bytes, in name order.

    It depends on the content, not on the file layout: the same tensors spread over other files give the same value.
    Raises `DataError` when the folder holds no safetensors file.
    """
    entries = [entry for path in sorted(folder.glob("*.safetensors")) for entry in _safetensors_entries(path)]
    tensors = {entry.name: entry for entry in entries}
    if not tensors:
        raise DataError(
            f"{folder} holds no .safetensors weights, so they cannot be identified. Convert the model with "
            f"`model.save_pretrained(folder)` of a current transformers."
        )
    digest = hashlib.sha256()
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(canonical_json([name, entry.dtype, entry.shape]))
        with open(entry.path, "rb") as handle:
            handle.seek(entry.begin)
            size = entry.end - entry.begin
            while size > 0:
                block = handle.read(min(size, 1 << 24))
                if not block:
                    raise DataError(
                        f"{entry.path} ends before tensor {name!r} does; download or save the model again."
                    )
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()


def _safetensors_entries(path: Path) -> list[_Entry]:
    """Every tensor of a file, with offsets from the beginning of the file."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(handle.read(length))
            return [
                _Entry(
                    path,
                    name,
                    entry["dtype"],
                    list(entry["shape"]),
                    *(8 + length + int(at) for at in entry["data_offsets"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is not a safetensors file ({error}); download or save the model again."
            ) from error
