"""The main job as a stranger runs it: `align run` on the embedded quickstart, with the real vLLM."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.quickstart_world import is_preferred

ROOT = Path(__file__).resolve().parents[2]
# Greedy, so that two engines can be compared token for token.
GREEDY = ["--set", "sample.temperature=0"]
JUDGE = ["--set", "judge.function=pipeline.quickstart_world:politeness"]


def completions(result: dict) -> dict[tuple[str, str], str]:
    found = {}
    for side, made in result["completions"].items():
        lines = [json.loads(line) for line in Path(made["output"]).read_text().splitlines()]
        found |= {(side, line["id"]): line["completion"] for line in lines}
    return found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed on this system")
def test_the_quickstart_learns_its_preference_and_both_engines_agree(align, tmp_path) -> None:
    command = [sys.executable, "-m", "pipeline", "run", *GREEDY, *JUDGE, "--store", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    prepared, cached, trained, sampled = (
        first[stage] for stage in ("prepare", "cache-ref", "train", "sample")
    )

    assert prepared["rows_in"] == prepared["rows_kept"] + sum(prepared["dropped"].values())
    assert cached["rows_scored"] == cached["rows_needed"]
    assert trained["step0"]["rewards/accuracies"] == 0.5
    assert trained["final"]["rewards/accuracies"] > 0.9
    assert {made["engine"] for made in sampled["completions"].values()} == {"vllm"}

    by_vllm = completions(sampled)
    shares = {
        side: [is_preferred(text) for (of, _), text in by_vllm.items() if of == side]
        for side in ("policy", "reference")
    }
    share = {side: sum(values) / len(values) for side, values in shares.items()}
    assert share["policy"] > 0.9
    assert share["policy"] > share["reference"]

    judged = first["judge"]
    assert judged["wins"] + judged["ties"] + judged["losses"] == judged["pairs"] == len(by_vllm) / 2
    assert judged["wins"] - judged["losses"] == sum(shares["policy"]) - sum(shares["reference"])

    by_transformers = [*GREEDY, "--set", "sample.engine=transformers"]
    code, out, err = align("sample", *by_transformers, "--store", tmp_path, "--json")
    assert code == 0, err
    assert completions(json.loads(out)) == by_vllm

    code, out, err = align("run", *GREEDY, "--store", tmp_path, "--json")
    assert code == 0, err
    assert all(part["reused"] for part in json.loads(out).values())
    assert err.count("already") == 4
