"""The content of a model's weights as one fingerprint, read from safetensors files without torch.

In: a model folder.  Out: the files that a loader opens for its weights, and a hash of the tensors in them.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import DataError
from cache.fingerprint import canonical_json

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# Whatever the loader opens, these decide which files it opens.
DECIDING = (CONFIG, WHOLE, INDEX, ADAPTER_CONFIG)


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
    """Hex sha256 over every tensor that is loaded from a model folder: name, dtype, shape and bytes, in name order.

    It depends on the content, not on the file layout: the same tensors spread over other files give the same value.
    Raises `DataError` as `weight_files` and `tensors_fingerprint` do.
    """
    return tensors_fingerprint(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers opens for the weights of a model folder, in name order.

    They are those that `transformers_weights` in config.json names, else model.safetensors, else those in
    model.safetensors.index.json; any other file in the folder is not read. Raises `DataError` where there are none, where
    a listed one is missing, and where it depends on the loader which ones are read.
    """
    _refuse_adapter_in_model(folder)
    named, whole, index = _named_in_config(folder), folder / WHOLE, folder / INDEX
    if named is not None:
        return listed_files(named)
    if whole.is_file() and index.is_file() and listed_files(index) != [whole]:
        raise DataError(
            f"{folder} holds {WHOLE}, and an {INDEX} of other files: transformers reads the first, vLLM the others. "
            f"Move away the one that is not the model."
        )
    if whole.is_file():
        return [whole]
    if index.is_file():
        return listed_files(index)
    raise DataError(
        f"{folder} holds no .safetensors weights under a name that is loaded ({WHOLE}, or {INDEX} with its files). "
        f"Convert the model with `model.save_pretrained(folder)` of a current transformers."
    )


def tensors_fingerprint(files: Iterable[Path]) -> str:
    """Hex sha256 over every tensor of these files; raises `DataError` for a damaged file, or a tensor that is in two."""
    tensors: dict[str, _Entry] = {}
    for entry in (entry for path in files for entry in _safetensors_entries(path)):
        other = tensors.setdefault(entry.name, entry)
        if other is not entry:
            raise DataError(
                f"Tensor {entry.name!r} is in {other.path} and in {entry.path}, so it depends on the loader which one "
                f"counts. Save the model again."
            )
    digest = hashlib.sha256()
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(canonical_json([name, entry.dtype, entry.shape]))
        _hash_bytes(entry, digest)
    return digest.hexdigest()


def _hash_bytes(entry: _Entry, digest: Any) -> None:
    with open(entry.path, "rb") as handle:
        handle.seek(entry.begin)
        size = entry.end - entry.begin
        while size > 0:
            block = handle.read(min(size, 1 << 24))
            if not block:
                raise DataError(
                    f"{entry.path} ends before tensor {entry.name!r} does; download or save the model again."
                )
            digest.update(block)
            size -= len(block)


def _refuse_adapter_in_model(folder: Path) -> None:
    if (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise DataError(
            f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}), which transformers adds to the model and others do "
            f"not. Move {ADAPTER_CONFIG} away to use the model alone, or merge the adapter into it."
        )


def _named_in_config(folder: Path) -> Path | None:
    """The file that `transformers_weights` in config.json names: one of tensors, or an index."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return None  # a configuration that is not JSON is reported where it is read
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise DataError(
            f"{path}: transformers_weights is {name!r}; expected the name of a .safetensors file in {folder}, or of an index."
        )
    return _inside(folder, name, path)


def listed_files(path: Path) -> list[Path]:
    """The files in an index, in name order; alone a file that is no index. Raises `DataError` if one is missing."""
    if not path.is_file():
        raise DataError(f"{path} is missing; download or save the model again.")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        files = [_inside(path.parent, name, path) for name in names]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not an index of weight files ({error!r}); download or save the model again."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lists {missing[0]}, which is missing" if missing else "lists no file"
        raise DataError(f"{path} {what}; download or save the model again.")
    return files


def _inside(folder: Path, name: str, where: Path) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(
            f"{where} names {name}, which is outside of {folder}. Expected a file in that folder."
        )
    return folder / name


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
