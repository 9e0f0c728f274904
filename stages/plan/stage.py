"""Predicts steps, tokens, memory and time of a training run before it starts.

In: the job of a run; its `start` and `reference` are not read. Out: a `TrainingPlan`. Writes nothing. Run it
with `align plan`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from stages.data.rows import RowSet
from stages.engine.packing import sized_packs
from stages.engine.packs import Pack, build_pack, inputs_of
from stages.engine.shared_tokens import SharedTokens, shared_tokens
from stages.models.fit import num_positions
from stages.models.loading import open_config
from stages.plan.measure import measure
from stages.plan.memory import LayerwiseShapes, Memory, Shapes, available_bytes, pairs_pack
from stages.runtime.distributed import World
from stages.runtime.malloc import give_back_freed_memory
from stages.train.job import Job
from stages.train.optimizers import make_optimizer
from stages.train.policy import load_trainable
from stages.train.preflight import check_settings

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (512, 1024, 2048, 4096)
MEASURED_PACKS = 3
COUNTED_STEPS = 20


@dataclass(frozen=True)
class Cell:
    """Predicted bytes of a step over `batch` pairs of `length` tokens; None if the model has too few positions."""

    batch: int
    length: int
    bytes: int | None


@dataclass(frozen=True)
class MeasuredRun:
    """Speed and memory of a few real passes; bytes are None if the system does not report them.

    `peak_bytes` is the peak of the live tensors of a step, which is what is predicted; `held_bytes` is that of the
    process, freed memory included. `run_seconds` is the whole run without its evaluations.
    """

    tokens_per_second: float
    peak_bytes: int | None
    held_bytes: int | None
    predicted_bytes: int
    run_seconds: float
    device: str
    packs: int


@dataclass(frozen=True)
class TrainingPlan:
    """The prediction. `tokens` counts what rows of a pack begin with once, `shared` is what those of a step share.

    `positions` is the size of the largest pack.
    """

    steps: int
    batch_size: int
    tokens: int
    tokens_per_step: int
    shared: SharedTokens
    available_bytes: int
    predicted: Memory
    positions: int
    table: list[Cell]
    measured: MeasuredRun | None

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, in bytes and seconds."""
        plain = asdict(self)
        positions = plain.pop("positions")
        plain["shared"] = self.shared._asdict()
        plain["predicted"] |= {"total": self.predicted.total, "positions": positions}
        if self.measured is None:
            del plain["measured"]
        return plain


def plan_training(job: Job, measured: bool, log: Callable[[str], None]) -> TrainingPlan:
    """Predict a run from tensor shapes and, with `measured`, from real passes.

    Raises `UsageError` or `MachineError` for settings that this machine cannot train with.
    """
    check_settings(job)
    packs, tokens_per_step, shared = _largest_packs(job, RowSet.of(job.rows, "train"))
    log(f"Predicting the memory of {job.source.name} from tensor shapes")
    predicted = Shapes(job.source, job.settings, job.adapter, job.compute).predict(packs[0])
    tokens = tokens_per_step * job.resolved.steps
    table = _table(job)
    if measured:
        log(f"Measuring {len(packs)} forward and backward passes of {job.source.name}")
    return TrainingPlan(
        steps=job.resolved.steps,
        batch_size=job.resolved.batch_size,
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        shared=shared,
        available_bytes=available_bytes(job.compute.device),
        predicted=predicted,
        positions=packs[0].input_ids.shape[1],
        table=table,
        measured=_measure(job, packs, predicted.total, tokens, log) if measured else None,
    )


def _largest_packs(job: Job, rows: RowSet) -> tuple[list[Pack], int, SharedTokens]:
    """The largest packs of the first steps, the largest first, the mean positions of a step, and what steps share."""
    order, budget, found, total = job.data_order(rows), job.compute.tokens_per_batch, [], 0
    steps = range(1, min(COUNTED_STEPS, job.resolved.steps_per_epoch) + 1)
    shares: list[SharedTokens] = []
    for step in steps:
        examples = order.examples_of(step)
        groups = [rows.example_rows(example, mismatched=False) for example in examples]
        if "kl" in job.loss.needs:  # mismatched rows are scored too, without gradient
            others = [rows.example_rows(example, mismatched=True) for example in examples]
            total += sum(
                length for length, _ in _packs(rows, [group for group in others if len(group)], budget)
            )
        shares.append(
            shared_tokens(
                [(rows.prompt(group[0]), [rows.completion(row) for row in group]) for group in groups]
            )
        )
        packs = _packs(rows, groups, budget)
        total += sum(length for length, _ in packs)
        found += packs
    found.sort(key=lambda entry: -entry[0])
    largest = [build_pack(rows, groups) for _, groups in found[:MEASURED_PACKS]]
    mean = np.array(shares or [SharedTokens(0, 0, 0)]).mean(0).round().astype(int).tolist()
    return largest, round(total / max(1, len(steps))), SharedTokens(*mean)


def _packs(rows: RowSet, groups: list[np.ndarray], budget: int) -> list[tuple[int, list[np.ndarray]]]:
    """The groups of each pack, and its positions."""
    packs = sized_packs([inputs_of(rows, group) for group in groups], budget)
    return [(size, [groups[item] for item in items]) for size, items in packs]


def _table(job: Job) -> list[Cell]:
    shapes = LayerwiseShapes(job.source, job.settings, job.adapter, job.compute)
    limit = num_positions(job.source) or max(LENGTHS)
    vocabulary = getattr(open_config(job.source).get_text_config(), "vocab_size", 2)

    def predict(batch: int, length: int) -> int | None:
        return shapes.predict(pairs_pack(batch, length, vocabulary)).total if length <= limit else None

    return [Cell(batch, length, predict(batch, length)) for batch in BATCHES for length in LENGTHS]


def _measure(
    job: Job, packs: list[Pack], predicted: int, tokens: int, log: Callable[[str], None]
) -> MeasuredRun:
    if job.compute.device.type == "cpu":
        give_back_freed_memory()
    policy = load_trainable(job, World(), log)
    optimizer = make_optimizer(policy.parameters, job.settings)
    found = measure(policy, optimizer, packs)
    rate = found.positions / found.seconds
    return MeasuredRun(
        tokens_per_second=rate,
        peak_bytes=found.peak_bytes,
        held_bytes=found.held_bytes,
        predicted_bytes=predicted,
        run_seconds=tokens / rate + job.resolved.steps * found.update_seconds,
        device=torch.cuda.get_device_name() if job.compute.device.type == "cuda" else "cpu",
        packs=len(packs),
    )
