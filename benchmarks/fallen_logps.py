"""Where the warning `chosen fallen` begins: trainings whose chosen log-probs fall by more and more, and what they write.

In: a folder with the models `stories260K-hf-hd32` and `babyllama105-hf-hd32` in `models/` and the data
`graded/tinystories_graded_synthetic.jsonl`. Each policy continues the held-out prompts, as does the untrained model; the
other story model compares the two by the mean log-prob it gives a token of each. Out: `results/fallen_logps.json` and
`.md`. Run from the repository root:

    python benchmarks/fallen_logps.py --data FOLDER
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from benchmarks.stories import stories
from pipeline.config import build_config
from pipeline.session import Session

TRAININGS = (
    *(("dpo", rate) for rate in (1e-4, 3e-4, 1e-3, 2e-3)),
    *(("simpo", rate) for rate in (1e-4, 3e-4, 6e-4, 1e-3)),
    *((name, rate) for name in ("kto", "aot", "alphapo") for rate in (3e-4, 1e-3)),
    *((name, 3e-4) for name in ("ipo", "apo_down", "wpo")),
    *((name, 1e-3) for name in ("cpo", "sft", "orpo")),
)
SAMPLE = {
    "engine": "transformers",
    "num_prompts": None,
    "max_tokens": 48,
    "temperature": 0.7,
    "compare": True,
}
POSITIONS = 256


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    data = options.parse_args().data
    judge = Judge(data / "models" / "babyllama105-hf-hd32")
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(data, name, rate, judge, Path(folder)) for name, rate in TRAININGS]
    rows.sort(key=lambda row: row["fall"])
    notes = (
        "stories260K on tinystories_graded_synthetic, best against worst; full fine-tuning, 32 pairs a step, 3 epochs, a fifth of the "
        "prompts held out. `fall` is how much the held-out `logps/chosen` fell, as a share of its value at step 0. `wins` is the share of "
        "held-out prompts whose continuation by the policy (48 tokens, temperature 0.7) babyllama105 finds likelier, by the mean "
        "log-prob of a token, than that of the untrained model; ties count half. `warned` says whether training ended with this warning."
    )
    write_results("fallen_logps", rows, "How far chosen log-probs may fall", notes)


class Judge:
    """Mean log-prob of a token of a continuation, in nats, by a model of stories."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(self, prompt: str, text: str) -> float:
        """Of the last half of the positions; an empty continuation scores as less likely than any."""
        import torch

        before = self.tokenizer(prompt)["input_ids"][-POSITIONS // 2 :]
        after = self.tokenizer(text, add_special_tokens=False)["input_ids"][: POSITIONS - len(before)]
        if not after:
            return float("-inf")
        ids = torch.tensor([before + after])
        with torch.no_grad():
            log_probs = self.model(ids).logits[0].log_softmax(-1)  # (tokens, vocabulary)
        return float(log_probs[len(before) - 1 : -1].gather(1, ids[0, len(before) :, None]).mean())


def run(data: Path, loss: str, rate: float, judge: Judge, store: Path) -> dict[str, Any]:
    """One training, its samples and the untrained model's."""
    tree = stories(data) | {
        "loss": {"name": loss},
        "train": {"learning_rate": rate, "batch_size": 32, "num_epochs": 3},
        "sample": SAMPLE,
    }
    said: list[str] = []
    session = Session(build_config(tree), store, log=said.append)
    for stage in ("prepare", "cache-ref"):
        session.run(stage)
    trained = session.run("train").as_json()
    made = session.run("sample").as_json()["completions"]
    sides = [
        [json.loads(line) for line in Path(made[side]["output"]).read_text().splitlines()]
        for side in ("policy", "reference")
    ]
    wins = [
        (ours > theirs) + (ours == theirs) / 2
        for ours, theirs in (
            [judge.score(one["prompt"], one["completion"]) for one in pair]
            for pair in zip(*sides, strict=True)
        )
    ]
    before, after = trained["step0"]["logps/chosen"], trained["final"]["logps/chosen"]
    row = {
        "name": loss,
        "learning_rate": rate,
        "fall": after / before - 1,
        "wins": sum(wins) / len(wins),
        "margin": trained["final"]["rewards/margins"],
        "accuracy": trained["final"]["rewards/accuracies"],
        "warned": any(
            "completions" in warning and "by more than" in warning for warning in trained["warnings"]
        ),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
