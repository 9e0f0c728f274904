"""Why SimPO and ORPO looked "stable but flat" elsewhere: the same run with float32 and with bfloat16 weights.

In: a folder with `models/stories260K-hf-hd32` and `graded/tinystories_graded_synthetic.jsonl`. Out:
`results/weights_dtype.json` and `.md`: held-out metrics at steps 0, 10 and 20 and at the end, and the
share of weights that an optimizer step changes at all. Both arms compute alike; only what AdamW
updates differs. Run from the repository root:

    python benchmarks/weights_dtype.py --data FOLDER
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from benchmarks.stories import stories
from pipeline.config import build_config
from pipeline.session import Session
from stages.data.rows import RowSet
from stages.engine.scorer import Scorer
from stages.losses import parse_loss
from stages.models.loading import load_model, resolve_model
from stages.runtime.compute import Compute
from stages.runtime.distributed import World
from stages.train.data_order import epoch_order, num_steps
from stages.train.step.row_scorer import RowScorer
from stages.train.step.step import accumulate_step, evaluate

LOSSES = ("simpo", "orpo", "dpo")
LEARNING_RATE, BATCH, EPOCHS, WARMUP = 1e-5, 32, 3, 4
SHOWN_STEPS = (0, 10, 20)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True)
    data = options.parse_args().data
    with tempfile.TemporaryDirectory() as folder:
        session, rows, reference = prepare(data, Path(folder))
        source = resolve_model(session.config.policy.model, None)
        found = [
            arm(source, rows, reference, name, dtype)
            for name in LOSSES
            for dtype in (torch.float32, torch.bfloat16)
        ]
    notes = (
        f"stories260K on tinystories_graded_synthetic, learning rate {LEARNING_RATE:g}, {BATCH} pairs a step, {EPOCHS} epochs, "
        f"warm-up {WARMUP} steps, then linear decay; fixed held-out set. `moved_first10`: mean share of weights whose value "
        "an optimizer step changed, over the first ten steps. In bfloat16 a weight has 8 significant bits: an update below "
        "1/256 of it is lost, so most weights never move and margins stay flat, whatever the loss."
    )
    write_results("weights_dtype", found, "float32 against bfloat16 weights", notes)


def prepare(data: Path, store: Path):
    config = build_config(stories(data, mismatched=False))
    session = Session(config, store, log=lambda line: None)
    session.run("prepare")
    session.run("cache-ref")
    job = session.inputs.job
    return session, {split: RowSet.of(job.rows, split) for split in ("train", "heldout")}, job.reference


def arm(source, rows, reference, name: str, dtype: torch.dtype) -> dict:
    """One training with weights kept in `dtype`."""
    loss = parse_loss({"name": name})
    compute = Compute(torch.device("cpu"), torch.float32, 2048)
    model = load_model(source, compute)
    scorer = Scorer(model, compute, print)
    model.to(dtype)  # after the scorer's self-check, which is for float32 weights
    if not loss.needs_reference:
        reference = None
    train, heldout = (
        RowScorer(scorer, rows[split], reference, loss, World()) for split in ("train", "heldout")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    steps = num_steps(rows["train"].num_examples, BATCH, EPOCHS, None)
    per_epoch = steps // EPOCHS
    result: dict = {"name": f"{name}, {str(dtype).removeprefix('torch.')} weights"}
    examples = range(rows["heldout"].num_examples)
    moved = []
    for step in range(steps + 1):
        if step in SHOWN_STEPS or step == steps:
            metrics = evaluate(heldout, loss, examples, {})
            label = "end" if step == steps else f"step{step}"
            for key, short in (
                ("rewards/margins", "margin"),
                ("rewards/accuracies", "accuracy"),
                ("loss", "loss"),
            ):
                result[f"{short}_{label}"] = metrics[key]
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(
                (step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP), 1.0
            )
        epoch, index = divmod(step, per_epoch)
        chosen = epoch_order(rows["train"].mismatch_groups, 0, epoch)[index * BATCH : (index + 1) * BATCH]
        accumulate_step(train, loss, chosen.tolist(), {})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        changed = sum(int((old != new).sum()) for old, new in zip(before, model.parameters(), strict=True))
        moved.append(changed / sum(parameter.numel() for parameter in model.parameters()))
    result["moved_first10"] = sum(moved[:10]) / len(moved[:10])
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
