"""`align plan`: what a training run will take - steps, tokens, memory, time - before it is started.

In: a prepared configuration; with `measure`, a few real passes of its model. Out: plain data for the
report. Nothing is refused and nothing is written.
"""

from typing import Any

import torch

from cache.artifacts import Artifact
from pipeline.config import RunConfig
from stages.data.rows import RowSet
from stages.engine.packing import pack_lengths
from stages.engine.packs import Pack, build_pack, fed_length
from stages.models.loading import ModelSource, architecture
from stages.plan.measure import Measured, measure
from stages.plan.memory import LayerwiseShapes, Shapes, available_bytes, pairs_pack
from stages.runtime.compute import Compute
from stages.runtime.distributed import World
from stages.runtime.malloc import give_back_freed_memory
from stages.train.data_order import epoch_order
from stages.train.job import Job
from stages.train.optimizers import make_optimizer
from stages.train.policy import load_trainable
from stages.train.preflight import check_feasible

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (512, 1024, 2048, 4096)
MEASURED_PACKS = 3
LOOKED_AT_STEPS = 20


def plan_training(
    config: RunConfig, rows: Artifact, source: ModelSource, compute: Compute, measured: bool, say: Any
) -> dict[str, Any]:
    """Everything `align plan` shows, as plain data; bytes and seconds."""
    job = Job(rows, source, {}, None, config.loss, config.train, compute, config.adapter)
    check_feasible(job)
    train_rows = RowSet.of(rows, "train")
    packs, positions = _packs(job, train_rows)
    say(f"Predicting memory from the shapes of {source.name}")
    own = Shapes(source, config.train, config.adapter, compute).predict(packs[0])
    result: dict[str, Any] = {
        "steps": job.plan.steps,
        "batch_size": job.plan.batch_size,
        "tokens": positions * job.plan.steps,
        "tokens_per_step": positions,
        "available_bytes": available_bytes(compute.device),
        "predicted": {**vars(own), "total": own.total, "positions": packs[0].input_ids.shape[1]},
        "table": _table(job),
    }
    if measured:
        say(f"Measuring {len(packs)} forward and backward passes")
        result["measured"] = _measured(job, packs, own.total, result["tokens"])
    return result


def _packs(job: Job, rows: RowSet) -> tuple[list[Pack], int]:
    """The largest packs of the first steps, the largest first, and the mean positions of a step."""
    order = epoch_order(rows.cycles, job.settings.seed, 0)
    size, found, total = job.plan.batch_size, [], 0
    starts = range(0, len(order), size)[:LOOKED_AT_STEPS]
    for start in starts:
        groups = [rows.example_rows(example, mismatched=False) for example in order[start : start + size]]
        lengths = [fed_length(rows, group) for group in groups]
        if "kl" in job.loss.needs:  # scored as well, without a gradient
            others = [rows.example_rows(example, mismatched=True) for example in order[start : start + size]]
            total += sum(fed_length(rows, group) for group in others if len(group))
        total += sum(lengths)
        plan = pack_lengths(lengths, job.compute.tokens_per_batch)
        found += [(sum(lengths[item] for item in items), [groups[item] for item in items]) for items in plan]
    found.sort(key=lambda entry: -entry[0])
    packs = [build_pack(rows, groups) for _, groups in found[:MEASURED_PACKS]]
    return packs, round(total / max(1, len(starts)))


def _table(job: Job) -> list[dict[str, Any]]:
    """Predicted bytes of a forward pass of so many pairs of such a length, for each cell the model has positions for."""
    shapes = LayerwiseShapes(job.source, job.settings, job.adapter, job.compute)
    described = architecture(job.source.folder)
    limit = described.get("max_position_embeddings") or max(LENGTHS)
    vocabulary = described.get("vocab_size") or 2
    return [
        {
            "batch": batch,
            "length": length,
            "bytes": shapes.predict(pairs_pack(batch, length, vocabulary)).total if length <= limit else None,
        }
        for batch in BATCHES
        for length in LENGTHS
    ]


def _measured(job: Job, packs: list[Pack], predicted: int, tokens: int) -> dict[str, Any]:
    if job.compute.device.type == "cpu":
        give_back_freed_memory()
    policy = load_trainable(job, World(), print)
    optimizer = make_optimizer(policy.parameters, job.settings)
    found: Measured = measure(policy, optimizer, packs)
    rate = found.positions / found.seconds
    run_seconds = tokens / rate + job.plan.steps * found.update_seconds
    return {
        "tokens_per_second": rate,
        "peak_bytes": found.peak_bytes,
        "held_bytes": found.held_bytes,
        "predicted_bytes": predicted,
        "run_seconds": run_seconds,
        "device": torch.cuda.get_device_name() if job.compute.device.type == "cuda" else "cpu",
        "packs": len(packs),
    }
