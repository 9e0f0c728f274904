"""Preparation killed at any time leaves nothing under a final name, and is then the same to the byte."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.prepare import shard_writer, sources
from tests.forked import exit_code, fork
from tests.pipeline.small_run import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """A tenth of the rows for as many shards and batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "SHARD_EXAMPLES", 200)
        patch.setattr(sources, "BATCH_ROWS", 50)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of about two and a half shards."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with open(path, "w") as handle:
        for number in range(500):
            row = {"prompt": f"question {number} " * 8, "chosen": f"yes {number}", "rejected": "no"}
            handle.write(json.dumps(row) + "\n")
    return path


def tree_of(data: Path, model: Path, workers: int) -> dict:
    return {
        "data": {"path": str(data)},
        "policy": {"model": str(model)},
        "prepare": {"num_workers": workers, "heldout_fraction": 0.1},
    }


def manifest(result: dict) -> dict:
    return json.loads((Path(result["artifact"]) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def whole(data, tiny_model, tmp_path_factory) -> dict:
    return manifest(run(tree_of(data, tiny_model, 1), tmp_path_factory.mktemp("whole"), "prepare"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_starts_anew(data, whole, tmp_path, tiny_model, workers):
    tree, store = tree_of(data, tiny_model, workers), tmp_path / "store"

    def killed() -> None:
        os.setsid()
        sys.addaudithook(kill_at_the_second_shard)
        run(tree, store, "prepare")

    child = fork(killed)
    assert exit_code(child) == -signal.SIGKILL
    (left,) = (store / "rows").iterdir()
    assert left.name.startswith(".tmp-")
    assert list(left.glob("train-00000.arrow"))
    while _members(child):  # the workers do not outlive the process that reads and writes
        time.sleep(0.1)

    found = manifest(run(tree, store, "prepare"))
    assert [entry for entry in found["files"] if entry["name"] != "config.yaml"] == [
        entry for entry in whole["files"] if entry["name"] != "config.yaml"
    ]
    assert found["counts"] == whole["counts"]


def kill_at_the_second_shard(event: str, arguments: tuple) -> None:
    """An audit hook: the first shard lies there whole, and rows are left to read."""
    if event == "open" and "train-00001" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)


def _members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(folder.name))
    return found
