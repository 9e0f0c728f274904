"""The command that measures on a GPU runs: its dry run on a CPU."""

import json
import os
import subprocess

import pytest

from tests.forking_python import forking_python
from tests.pipeline.small_run import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_the_dry_run_on_a_cpu_ends_well_and_writes_its_rows(tmp_path) -> None:
    import benchmarks.gpu  # noqa: F401
    import tests.gpu.test_scoring  # noqa: F401  what both programs import, once for them and for other tests

    command = ["bash", str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    with forking_python(tmp_path) as python:
        environment = {**os.environ, "PYTHON": str(python)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    log = (tmp_path / "gpu_tests.log").read_text()
    assert " passed" in log
    assert "failed" not in log
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert {"hh, runs", "hh, varlen", "hh, padded", "long answers, padded, presorted"} <= rows.keys()
    assert rows["hh, runs"]["pairs_per_second"] > 0
    [tree] = json.loads((tmp_path / "gpu_tree.json").read_text())["rows"]
    assert tree["examples_per_second_tree"] > 0
    assert json.loads((tmp_path / "gpu_training.json").read_text())["rows"][0]["predicted_gib"] >= 0


@pytest.mark.slow
def test_an_unknown_argument_is_named() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--tny"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown argument --tny" in done.stderr
