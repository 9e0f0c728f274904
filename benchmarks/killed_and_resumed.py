"""A training that is killed at random and continued, until it is done: does it end in the same bytes?

In: a folder with the model `models/stories260K-hf-hd32` and the data `graded/tinystories_graded_synthetic.jsonl`, or
nothing, and then the quickstart. Out: `results/killed_and_resumed.json` and `.md`. Each run is `align train` in a
process of its own that gets SIGKILL after a random step, `--kills` times, and is then left alone. Run from the
repository root:

    python benchmarks/killed_and_resumed.py [--data FOLDER] [--kills 10] [--losses dpo,bco]
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_results
from benchmarks.stories import stories

TRAIN = {"learning_rate": 3e-4, "batch_size": 32, "num_epochs": 16, "eval_steps": 8, "save_steps": 2}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--losses", default="dpo,bco")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            campaign(loss, arguments, Path(folder) / loss, random.Random(f"{loss} {arguments.seed}"))
            for loss in arguments.losses.split(",")
        ]
    notes = (
        f"`align train` killed by SIGKILL {arguments.kills} times, up to a fifth of a second after a random step, and typed again, against the same run left "
        f"alone; a checkpoint every {TRAIN['save_steps']} steps. `equal` compares the sha256 of model.safetensors; `metrics_equal` "
        "every line of metrics.jsonl but for `step_seconds`. `steps_repeated` were trained again after kills."
    )
    write_results("killed_and_resumed", rows, "Killed at random and resumed", notes)
    if not all(row["equal"] and row["metrics_equal"] for row in rows):
        raise SystemExit("a resumed run is not the uninterrupted one")


def campaign(loss: str, arguments: argparse.Namespace, folder: Path, chance: random.Random) -> dict:
    """One loss: the uninterrupted run, and the killed one over a copy of the same store."""
    config = folder / "run.yaml"
    folder.mkdir(parents=True)
    config.write_text(yaml.safe_dump(tree(arguments.data, loss)))
    whole, killed = folder / "whole", folder / "killed"
    for stage in ("prepare", "cache-ref"):
        align(stage, config, whole)
    shutil.copytree(whole, killed)
    align("train", config, whole)
    total = total_steps(whole)
    reached, repeated = [], 0
    for target in sorted(chance.sample(range(total - 20), arguments.kills)):
        process = subprocess.Popen(command("train", config, killed), cwd=ROOT, stderr=subprocess.DEVNULL)
        while last_line(killed) < target and process.poll() is None:
            time.sleep(0.001)
        try:  # anywhere in the steps, evaluations and checkpoints that come next
            process.wait(timeout=chance.uniform(0, 0.2))
            raise SystemExit("the run ended before it was killed: raise num_epochs in TRAIN")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        reached.append(last_line(killed))
        repeated += reached[-1] - newest_step(killed)
        print(f"{loss}: killed at step {reached[-1]} of {total}", flush=True)
    align("train", config, killed)
    one, two = (policy(store) for store in (whole, killed))
    return {
        "name": loss,
        "steps": total,
        "kills": len(reached),
        "killed_at_steps": ", ".join(map(str, reached)),
        "steps_repeated": repeated,
        "sha256": digest(one)[:16],
        "equal": digest(one) == digest(two),
        "metrics_equal": metrics(one) == metrics(two),
    }


def tree(data: Path | None, loss: str) -> dict:
    own = {"data": {"path": "quickstart"}, "policy": {"model": "quickstart"}}
    if data is not None:
        own = stories(data)
    return {**own, "compute": {"device": "cpu"}, "loss": {"name": loss}, "train": TRAIN}


def command(stage: str, config: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", stage, "-c", str(config), "--store", str(store)]


def align(stage: str, config: Path, store: Path) -> None:
    subprocess.run(command(stage, config, store), cwd=ROOT, check=True, capture_output=True)


def policy(store: Path) -> Path:
    return next((store / "policy").glob("[!.]*"))


def newest_step(store: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    found = (store / "policy").glob(".tmp-*/checkpoint-*")
    return max((int(folder.name.split("-")[1]) for folder in found), default=0)


def last_line(store: Path) -> int:
    """Step of the newest whole line of the metrics; 0 without one."""
    files = list((store / "policy").glob(".tmp-*/metrics.jsonl"))
    lines = files[0].read_text().split("\n")[:-1] if files else []
    return json.loads(lines[-1])["step"] if lines else 0


def total_steps(store: Path) -> int:
    return json.loads((policy(store) / "manifest.json").read_text())["counts"]["steps"]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "step_seconds"} for line in lines]


if __name__ == "__main__":
    main()
