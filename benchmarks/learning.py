"""Every loss trained from one reference store on real, graded stories: does it learn, and at what cost?

In: a folder with the model `models/stories260K-hf-hd32` and the data
`graded/tinystories_graded_synthetic.jsonl` (403 prompts, four continuations each, scored; best against
worst). Out: `results/learning.json` and `.md`. Run from the repository root:

    python benchmarks/learning.py --data FOLDER [--losses dpo,kto] [--seeds 0,1,2]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from benchmarks.stories import stories
from pipeline.config import build_config
from pipeline.session import Session
from stages.losses import LOSSES

LEARNING_RATE, BATCH, EPOCHS, HELDOUT = 3e-4, 32, 3, 0.2
VARIANTS = {
    "ipo (sum)": {"name": "ipo", "normalize": "sum"},
    "mixture (dpo + 0.2 sft)": {
        "name": "mixture",
        "parts": [{"weight": 1.0, "loss": {"name": "dpo"}}, {"weight": 0.2, "loss": {"name": "sft"}}],
    },
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--losses", default="all", help="comma-separated names, or all")
    options.add_argument("--seeds", default="0,1,2")
    arguments = options.parse_args()
    blocks = {name: {"name": name} for name in LOSSES if name != "mixture"} | VARIANTS
    if arguments.losses != "all":
        blocks = {name: blocks[name] for name in arguments.losses.split(",")}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        rows = campaign(arguments.data, blocks, seeds, Path(folder))
    notes = (
        f"stories260K on tinystories_graded_synthetic, best against worst; full fine-tuning, learning rate {LEARNING_RATE:g}, "
        f"{BATCH} pairs a step, {EPOCHS} epochs, {HELDOUT:.0%} of the prompts held out; each loss with its own defaults, "
        f"mean over seeds {', '.join(map(str, seeds))} (accuracy's spread: largest minus smallest). Log-ratios in nats, "
        "policy minus reference, at the end. One reference store serves every row: `reference forwards` counts the "
        "forward passes of the reference that the row needed. The grade is itself a log-prob, so length-normalised "
        "rewards start above one half: watch their loss and margin."
    )
    write_results("learning", rows, "Every loss from one reference store", notes)


def campaign(data: Path, blocks: dict, seeds: list[int], store: Path) -> list[dict]:
    rows = []
    for name, block in blocks.items():
        runs = [run(data, block, seed, store) for seed in seeds]
        row = {"name": name, "reference_forwards": sum(found["forwards"] for found in runs)}
        for key, label in (
            ("loss", "loss"),
            ("rewards/accuracies", "accuracy"),
            ("rewards/margins", "margin"),
        ):
            row[f"{label}_step0"] = statistics.mean(found["step0"][key] for found in runs)
            row[f"heldout_{label}"] = statistics.mean(found["final"][key] for found in runs)
        accuracies = [found["final"]["rewards/accuracies"] for found in runs]
        row["accuracy_spread"] = max(accuracies) - min(accuracies)
        for side in ("chosen", "rejected"):
            values = [found["final"].get(f"logratios/{side}") for found in runs]
            row[f"logratio_{side}"] = None if None in values else statistics.mean(values)
        row["seconds_a_run"] = round(statistics.median(found["seconds"] for found in runs), 1)
        rows.append(row)
        print(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()},
            flush=True,
        )
    return rows


def run(data: Path, block: dict, seed: int, store: Path) -> dict:
    """One training through the stages; only the first that needs the reference runs it."""
    config = build_config(
        {
            **stories(data, heldout_fraction=HELDOUT),
            "loss": block,
            "train": {
                "learning_rate": LEARNING_RATE,
                "batch_size": BATCH,
                "num_epochs": EPOCHS,
                "seed": seed,
            },
        }
    )
    session = Session(config, store, log=lambda line: None)
    session.run("prepare")
    forwards = session.run("cache-ref").as_json()["forwards"] if config.loss.needs_reference else 0
    began = time.monotonic()
    result = session.run("train").as_json()
    return {**result, "forwards": forwards, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
