"""The four stages on hh-rlhf's harmless test set: rows kept and dropped, and the time of each stage.

In: a folder with `pairs/hh_harmless_base_test.jsonl.gz` and `models/stories260K-hf-hd32`. Out:
`results/stages_on_hh.json` and `.md`. Each stage is the command a person types, timed as a whole
process. Run from the repository root:

    python benchmarks/stages_on_hh.py --data FOLDER
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_results

STAGES = (("prepare",), ("cache-ref",), ("train",), ("train", "--loss", "kto"), ("sample",))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    data = options.parse_args().data.resolve()
    settings = {
        "data.path": data / "pairs" / "hh_harmless_base_test.jsonl.gz",
        "policy.model": data / "models" / "stories260K-hf-hd32",
        "prepare.max_length": 512,
        "train.learning_rate": "1e-4",
        "train.batch_size": 64,
        "train.num_epochs": 1,
        "sample.num_prompts": 16,
        "sample.max_tokens": 64,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with tempfile.TemporaryDirectory() as store:
        rows = [timed(list(stage), sets, store) for stage in STAGES]
    notes = "stories260K (260 thousand parameters, vocabulary 512, 512 positions), default dpo and kto settings but for the learning rate; whole processes, imports included."
    write_results("stages_on_hh", rows, "The four stages on hh-rlhf harmless-base test", notes)


def timed(stage: list[str], sets: list[str], store: str) -> dict:
    """Run one command and keep what it counted."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pipeline", *stage, *sets, "--store", store, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    row = {"name": " ".join(stage), "seconds": round(time.monotonic() - began, 1)}
    for key in (
        "rows_in",
        "rows_kept",
        "dropped",
        "rows_scored",
        "forwards",
        "steps",
        "engine",
        "num_completions",
    ):
        if key in result:
            row[key] = result[key]
    if "final" in result:
        for key, label in (("loss", "loss"), ("rewards/accuracies", "accuracy")):
            row[f"heldout_{label}"] = f"{result['step0'][key]:.3f} -> {result['final'][key]:.3f}"
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
