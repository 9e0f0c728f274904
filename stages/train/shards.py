"""The shards of a sharded run in safetensors files, one for each rank, that any number of ranks can read.

In: a state, nested dictionaries of tensors, some of them sharded (DTensor).  Out: `shards/<rank>.safetensors`, and the
same state read back. safetensors holds numbers alone, while torch's distributed checkpoints are pickles, which can run
code when they are read. A rank reads only the rows of a tensor that are its own.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.errors import CorruptError, StaleError
from stages.runtime.distributed import World, local_part

FOLDER = "shards"
ROWS = "first_rows"


def are_shards(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is that of a sharded run; raises `StaleError` for one of an older version."""
    if (folder / ".metadata").is_file():
        raise StaleError(
            f"{folder} has shards in the format of an older version, which can run code and is not read any more. "
            f"Delete it; an older checkpoint or step 0 takes its place."
        )
    return (folder / FOLDER).is_dir()


def write_shards(state: Mapping[str, Any], folder: Path, world: World) -> None:
    """Write this rank's parts of the tensors in `state`; the first rank also writes those that are not sharded."""
    from safetensors.torch import save_file

    parts: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    places: set[int] = set()
    for name, tensor in _tensors(state):
        begin, part = _first_row(tensor, world), local_part(tensor).detach().contiguous()
        if (begin is None and world.is_main) or (begin is not None and len(part)):
            # safetensors refuses two names of one tensor, as tied weights are.
            parts[name] = part.clone() if part.data_ptr() in places else part
            places.add(part.data_ptr())
            first_rows[name] = begin or 0
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file(parts, folder / FOLDER / f"{world.rank:05d}.safetensors", {ROWS: json.dumps(first_rows)})


def read_shards(state: Mapping[str, Any], folder: Path, world: World) -> None:
    """Fill the tensors of `state` in place with what `write_shards` wrote on any number of ranks.

    Raises `CorruptError` for a tensor that is not there as a whole.
    """
    from safetensors import safe_open

    wanted = dict(_tensors(state))
    missing = {name: len(_rows(tensor)) for name, tensor in wanted.items()}
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            first_rows = json.loads(file.metadata()[ROWS])
            for name in first_rows.keys() & wanted.keys():
                stored = file.get_slice(name)
                missing[name] -= _copy_rows(stored, first_rows[name], wanted[name], world)
    if incomplete := [name for name, rows in missing.items() if rows]:
        raise CorruptError(
            f"{folder / FOLDER} lacks rows of {', '.join(incomplete[:3])}. Use an older checkpoint."
        )


@torch.no_grad()
def _copy_rows(stored: Any, first_row: int, tensor: Tensor, world: World) -> int:
    """Copy the rows that a stored part and this rank's part of a tensor share; returns their number."""
    if not stored.get_shape():  # a number, such as Adam's step
        local_part(tensor).copy_(stored[...])
        return 1
    own, mine = _rows(tensor), _first_row(tensor, world) or 0
    begin, end = max(first_row, mine), min(first_row + stored.get_shape()[0], mine + len(own))
    if begin >= end:
        return 0
    own[begin - mine : end - mine].copy_(stored[begin - first_row : end - first_row])
    return end - begin


def _first_row(tensor: Tensor, world: World) -> int | None:
    """The row of the whole tensor at which this rank's part begins; None for a tensor that every rank has whole."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        return None
    assert tensor.placements == (Shard(0),), "fully_shard divides the rows of a tensor"
    # As torch.chunk: every part but the last ones has the same number of rows.
    return min(world.rank * -(-tensor.shape[0] // world.size), tensor.shape[0])


def _rows(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a number as one row."""
    part = local_part(tensor)
    return part if part.ndim else part[None]


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dictionaries, by its path; their other values belong to the settings of the run."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value
