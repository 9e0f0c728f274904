"""Shards in safetensors: what ranks wrote, another number of ranks reads; nothing in a checkpoint can run code."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from cache.errors import CorruptError, StaleError
from stages.runtime.distributed import World
from stages.train.shards import FOLDER, are_shards, read_shards, write_shards
from tests.forked import on_two_ranks

SHAPES = {"matrix": (7, 3), "vector": (5,), "one row": (1, 4)}


def whole(offset: float = 0.0) -> dict[str, torch.Tensor]:
    """Tensors whose numbers of rows two ranks cannot share equally; one has a row for the first rank alone."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) + offset for name, shape in SHAPES.items()}


def sharded(tensors: dict[str, torch.Tensor], size: int, step: float) -> dict:
    """A state as torch gives it: sharded weights, tied once, a number on all ranks, and settings."""
    mesh = DeviceMesh("cpu", list(range(size)))
    parts = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in tensors.items()}
    return {
        "model": {**parts, "tied": parts["matrix"]},
        "optimizer": {"state": {"matrix": {"step": torch.tensor(step)}}, "param_groups": [{"lr": 1.0}]},
    }


def write(folder: Path, size: int) -> None:
    write_shards(sharded(whole(), size, 3.0), folder, World(dist.get_rank(), size, sharded=True))


def read(folder: Path, size: int) -> dict[str, torch.Tensor]:
    state = sharded(whole(100.0), size, 0.0)
    read_shards(state, folder, World(dist.get_rank(), size, sharded=True))
    assert state["optimizer"]["state"]["matrix"]["step"].item() == 3.0
    return {name: value.full_tensor() for name, value in state["model"].items()}


def assert_whole(found: dict[str, torch.Tensor]) -> None:
    for name, value in {**whole(), "tied": whole()["matrix"]}.items():
        assert torch.equal(found[name], value), name


def join(size: int) -> None:
    if size == 1:
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(2, 2), (2, 1), (1, 2)])
def test_any_number_of_ranks_reads_what_any_number_wrote(writers, readers, tmp_path):
    def work(size: int, task) -> None:
        join(size)
        task()

    def run(size: int, task) -> None:
        if size == 2:
            errors = tmp_path / "errors.txt"
            assert on_two_ranks(lambda: work(2, task), errors) == [0, 0], errors.read_text()
        else:
            if dist.is_initialized():
                dist.destroy_process_group()
            work(1, task)
            dist.destroy_process_group()

    run(writers, lambda: write(tmp_path, writers))
    assert len(list((tmp_path / FOLDER).iterdir())) == writers
    run(readers, lambda: assert_whole(read(tmp_path, readers)))


@pytest.fixture
def alone():
    if dist.is_initialized():
        dist.destroy_process_group()
    join(1)
    yield
    dist.destroy_process_group()


def test_a_missing_shard_is_noticed(alone, tmp_path):
    write(tmp_path, 1)
    (tmp_path / FOLDER / "00000.safetensors").unlink()
    with pytest.raises(CorruptError, match="lacks rows of model/matrix, model/vector"):
        read(tmp_path, 1)


def test_a_pickle_is_not_opened(alone, tmp_path):
    """What the distributed checkpoints of torch begin with: code that runs when it is read."""

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(StaleError, match="can run code and is not read"):
        are_shards(tmp_path)
    assert not (tmp_path / "it ran").exists()
