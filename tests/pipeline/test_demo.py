"""The main job as a stranger runs it: `align run` on the embedded quickstart, with the real vLLM."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.quickstart_world import is_preferred

ROOT = Path(__file__).resolve().parents[2]
# Greedy, so that two engines can be compared token for token.
GREEDY = ["--set", "sample.temperature=0"]


def align(*arguments: str, store: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline", *arguments, "--store", str(store), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done


def completions(result: dict) -> dict[tuple[str, str], str]:
    lines = [json.loads(line) for line in Path(result["output"]).read_text().splitlines()]
    return {(line["side"], line["id"]): line["completion"] for line in lines}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed on this system")
def test_the_quickstart_learns_its_preference_and_both_engines_agree(tmp_path) -> None:
    first = json.loads(align("run", *GREEDY, store=tmp_path).stdout)
    prepared, cached, trained, sampled = (
        first[stage] for stage in ("prepare", "cache-ref", "train", "sample")
    )

    assert prepared["rows_in"] == prepared["rows_kept"] + sum(prepared["dropped"].values())
    assert cached["rows_scored"] == cached["rows_needed"]
    assert trained["step0"]["rewards/accuracies"] == 0.5
    assert trained["final"]["rewards/accuracies"] > 0.9
    assert sampled["engine"] == "vllm"

    by_vllm = completions(sampled)
    shares = {
        side: [is_preferred(text) for (of, _), text in by_vllm.items() if of == side]
        for side in ("policy", "reference")
    }
    share = {side: sum(values) / len(values) for side, values in shares.items()}
    assert share["policy"] > 0.9
    assert share["policy"] > share["reference"]

    other = align("sample", *GREEDY, "--set", "sample.engine=transformers", store=tmp_path)
    assert completions(json.loads(other.stdout)) == by_vllm

    again = align("run", *GREEDY, store=tmp_path)
    assert all(part["reused"] for part in json.loads(again.stdout).values())
    assert again.stderr.count("already") == 4
