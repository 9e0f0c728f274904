"""Preparation killed at any time leaves nothing under a final name, and is then the same to the byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def command(data, model, store, workers):
    return [
        *(sys.executable, "-m", "pipeline", "prepare", "--store", str(store), "--json"),
        *("--set", f"data.path={data}", "--set", f"policy.model={model}"),
        *("--set", f"prepare.num_workers={workers}", "--set", "prepare.heldout_fraction=0.1"),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_starts_anew(tmp_path, tiny_model, workers):
    data = tmp_path / "rows.jsonl"
    with open(data, "w") as handle:
        for number in range(5_000):
            row = {"prompt": f"question {number} " * 8, "chosen": f"yes {number}", "rejected": "no"}
            handle.write(json.dumps(row) + "\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        command(data, tiny_model, whole, 1), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    expected = json.loads((Path(json.loads(done.stdout)["artifact"]) / "manifest.json").read_text())

    process = subprocess.Popen(
        command(data, tiny_model, killed, workers),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    # The first shard is written long before the last row is read.
    while process.poll() is None and not list(killed.glob("rows/.tmp-*/train-*.arrow")):
        time.sleep(0.01)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path for path in (killed / "rows").iterdir() if not path.name.startswith(".tmp-")] == []
    until = time.monotonic() + 20
    while _members(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert _members(process.pid) == []  # the workers do not outlive the process that reads and writes

    done = subprocess.run(
        command(data, tiny_model, killed, workers), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads((Path(json.loads(done.stdout)["artifact"]) / "manifest.json").read_text())
    assert [entry for entry in found["files"] if entry["name"] != "config.yaml"] == [
        entry for entry in expected["files"] if entry["name"] != "config.yaml"
    ]
    assert found["counts"] == expected["counts"]


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
