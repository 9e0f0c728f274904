"""Four things that should not matter, and one that does: training curves laid over each other.

In: a folder with `models/stories260K-hf-hd32` and `graded/tinystories_graded_synthetic.jsonl`. Out:
`results/training.json`, `.md`, and `results/training_<figure>.png`: float32 against bfloat16 weights, a batch of 64 as any
split, one against two ranks, full against LoRA training where peft is installed. Run from the repository root:

    python benchmarks/training_curves.py --data FOLDER
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, write_results
from benchmarks.stories import stories
from pipeline.config import build_config
from pipeline.session import Session
from stages.train import loop
from stages.train import stage as training
from stages.train.audit import audit
from stages.train.monitoring.metrics_log import read_metrics
from stages.train.policy import Trainable, load_trainable

EPOCHS, EVAL_STEPS = 6, 3
SAME_RUN = ("splits", "ranks")  # figures whose arms are one run, up to rounding
RATES = {"full": 3e-4, "small": 1e-5, "lora": 3e-3}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    data = options.parse_args().data
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: figure(data, Path(folder)) for name, figure in FIGURES.items()}
    rows = []
    for name, arms in figures.items():
        draw(name, arms)
        first = next(iter(arms.values())) if name in SAME_RUN else None
        rows += [row(name, label, lines, first) for label, lines in arms.items()]
    notes = (
        "stories260K on tinystories_graded_synthetic, dpo, 64 pairs a step, "
        f"{EPOCHS} epochs; held-out metrics at the end; `max_loss_difference` is the largest difference of a step's training loss "
        "from the first arm's, where nothing but rounding should differ. `weights_changed`: mean over the steps. A split changes only rounding. bfloat16 weights at learning rate 1e-5 lose most updates. "
        + ("" if "lora" in FIGURES else "LoRA: not measured, peft is not here. ")
        + "\n\n"
        + "\n\n".join(f"![{name}](training_{name}.png)" for name in figures)
    )
    write_results("training", rows, "Training curves", notes)


def tree(data: Path, rate: float, **blocks: dict) -> dict:
    own = {
        **stories(data, mismatched=False),
        "compute": {"device": "cpu", "dtype": "float32"},
        "train": {"learning_rate": rate, "batch_size": 64, "num_epochs": EPOCHS, "eval_steps": EVAL_STEPS},
    }
    return {**own, **{block: {**own.get(block, {}), **values} for block, values in blocks.items()}}


def train(settings: dict, store: Path) -> list[dict]:
    """The metrics of one training, by the stages in this process."""
    session = Session(build_config(settings), store, log=lambda line: None)
    for stage in ("prepare", "cache-ref"):
        session.run(stage)
    result = session.run("train").as_json()
    print(store.name, result["final"]["loss"], result["final"]["rewards/accuracies"], flush=True)
    return read_metrics(Path(result["artifact"]) / "metrics.jsonl")


def train_on_ranks(settings: dict, store: Path, ranks: int) -> list[dict]:
    """The same under torchrun."""
    for stage in ("prepare", "cache-ref"):
        Session(build_config(settings), store, log=lambda line: None).run(stage)
    config = store / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launch, "-m", "pipeline", "train", "-c", str(config), "--store", str(store), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return read_metrics(Path(json.loads(done.stdout)["artifact"]) / "metrics.jsonl")


def weights(data: Path, folder: Path) -> dict[str, list[dict]]:
    """float32 masters against weights that are themselves bfloat16, at two learning rates."""
    arms = {}
    for rate in (RATES["full"], RATES["small"]):
        for dtype in (torch.float32, torch.bfloat16):

            def load(*arguments, dtype: torch.dtype = dtype) -> Trainable:
                policy = load_trainable(*arguments)
                policy.model.to(dtype)  # after the scorer's self-check, which is for float32 weights
                return policy

            loop.load_trainable = load
            training.audit = _no_audit  # it would refuse rounded weights: the store is the float32 model's
            label = f"{str(dtype).removeprefix('torch.')} weights, rate {rate:g}"
            arms[label] = train(tree(data, rate), folder / f"weights-{len(arms)}")
    loop.load_trainable, training.audit = load_trainable, audit
    return arms


def _no_audit(*_: object) -> float:
    return 0.0


def splits(data: Path, folder: Path) -> dict[str, list[dict]]:
    """64 pairs in one pack, in a few, in one for each pair."""
    budgets = {
        "one pack": 1 << 20,
        "packs of 4096 tokens": 4096,
        "packs of 1024 tokens": 1024,
        "a pack a pair": 1,
    }
    return {
        label: train(
            tree(data, RATES["full"], compute={"tokens_per_batch": budget}), folder / f"split-{budget}"
        )
        for label, budget in budgets.items()
    }


def ranks(data: Path, folder: Path) -> dict[str, list[dict]]:
    settings = tree(data, RATES["full"])
    return {
        "1 rank": train(settings, folder / "rank-1"),
        "2 ranks": train_on_ranks(settings, folder / "rank-2", 2),
    }


def lora(data: Path, folder: Path) -> dict[str, list[dict]]:
    return {
        f"all weights, rate {RATES['full']:g}": train(tree(data, RATES["full"]), folder / "full"),
        f"LoRA r 16, rate {RATES['lora']:g}": train(
            tree(data, RATES["lora"], adapter={"name": "lora", "r": 16}), folder / "lora"
        ),
        f"LoRA r 16, rate {RATES['full']:g}": train(
            tree(data, RATES["full"], adapter={"name": "lora", "r": 16}), folder / "lora-slow"
        ),
    }


FIGURES = {"weights": weights, "splits": splits, "ranks": ranks}
if importlib.util.find_spec("peft"):
    FIGURES["lora"] = lora


def row(figure: str, label: str, lines: list[dict], first: list[dict] | None) -> dict:
    steps = [line for line in lines if "loss" in line]
    final = lines[-1]
    found = {
        "name": f"{figure}: {label}",
        "steps": final["step"],
        "heldout_loss": final["eval/loss"],
        "heldout_accuracy": final["eval/rewards/accuracies"],
        "heldout_margin": final["eval/rewards/margins"],
        "weights_changed": sum(line["weights_changed"] for line in steps) / len(steps),
    }
    if first is not None:
        others = [line for line in first if "loss" in line]
        found["max_loss_difference"] = max(
            abs(a["loss"] - b["loss"]) for a, b in zip(steps, others, strict=True)
        )
    return found


def draw(name: str, arms: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "loss": "training loss",
        "eval/loss": "held-out loss",
        "eval/rewards/accuracies": "held-out accuracy",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 4), layout="constrained")
    styles = ("-", "--", "-.", ":")
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for style, (label, lines) in zip(styles, arms.items(), strict=False):
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.6)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"training_{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
