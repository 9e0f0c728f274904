"""Online rounds beside offline training: the reward rises, what it costs, and the same number of steps on fixed data.

In: a folder with the model `models/stories260K-hf-hd32` and the stories `graded/tinystories_graded_synthetic.jsonl`, whose
prompts are continued; the judge is `benchmarks.rewards:cheerfulness`. Out: `results/online.json` and `.md`. Run from the
repository root:

    python benchmarks/online.py --data FOLDER [--rounds 6]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from benchmarks.stories import stories
from pipeline.config import build_config
from pipeline.session import Session

PROMPTS, SAMPLES, BATCH, RATE = 64, 4, 16, 3e-4


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=6)
    arguments = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rounds, prompts in (
            ("online", arguments.rounds, PROMPTS),
            ("online, one step a round", arguments.rounds * PROMPTS // BATCH, BATCH),
            ("offline", 1, PROMPTS * arguments.rounds),
        ):
            rows += campaign(arguments.data, name, rounds, prompts, Path(folder) / str(rounds))
    notes = (
        f"stories260K continues the prompts of tinystories_graded_synthetic, {SAMPLES} samples each, 48 tokens, temperature 1; the judge is the "
        f"share of cheerful words (`benchmarks/rewards.py`); best against worst, dpo (beta 0.1), learning rate {RATE:g}, batches of {BATCH} pairs, "
        "optimizer state carried on. All campaigns sample as many prompts; offline samples all of them from the untrained model, which answers "
        "a prompt that comes again alike, so it has fewer pairs: compare it with the round of as many. Prompts are drawn without "
        "repetition as long as there are any. "
        "`reward`, `wins` (against the untrained model, with 95 % interval), `kl` (nats a completion, to the reference) and "
        "`tokens` are of the held-out prompts. `reference rows` counts the rows that the reference scored; each "
        "was new."
    )
    write_results("online", rows, "Online rounds beside offline training", notes)


def campaign(data: Path, name: str, rounds: int, prompts: int, store: Path) -> list[dict[str, Any]]:
    tree = stories(data) | {
        "loss": {"name": "dpo"},
        "train": {
            "learning_rate": RATE,
            "batch_size": BATCH,
            "num_epochs": 1,
            "lr_scheduler_type": "constant",
        },
        "sample": {"engine": "transformers", "num_prompts": None, "max_tokens": 48, "temperature": 1.0},
        "judge": {"function": "benchmarks.rewards:cheerfulness"},
        "online": {
            "rounds": rounds,
            "prompts_per_round": prompts,
            "num_samples": SAMPLES,
            # The model was trained on stories of several hundred tokens: hardly one ends within 48.
            "unfinished": "keep",
        },
    }
    began = time.monotonic()
    found = Session(build_config(tree), store).run("online").as_json()
    seconds = time.monotonic() - began
    policies = [one["policy"] for one in found["rounds"]] + [found["last"]]
    examples, rows = 0, []
    for number, policy in enumerate(policies):
        one = found["rounds"][number] if number < len(found["rounds"]) else None
        every = max(1, rounds // 8)
        if number % every == 0 or one is None:
            rate, low, high = policy["wins"]
            rows.append(
                {
                    "name": name,
                    "round": number,
                    "trained pairs": examples,
                    "reward": policy["reward"],
                    "wins": "" if number == 0 else f"{rate:.2f} ({low:.2f} to {high:.2f})",
                    "kl": policy["kl"],
                    "tokens": policy["tokens"],
                    "reference rows": sum(each["reference_rows"] for each in found["rounds"][:number])
                    + sum(each["reference_rows"] for each in policies[: number + 1]),
                    "seconds": round(seconds) if one is None else None,
                }
            )
            print(rows[-1], flush=True)
        examples += one["pairs"] if one else 0
    return rows


if __name__ == "__main__":
    main()
