"""Steps, tokens, memory and time of a training run, before it is started.

In: the job of a run, whose start and reference may be missing; with `measured`, a few real passes of its
model. Out: a `TrainingPlan`. Nothing is written. Run it with `align plan`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stages.data.rows import RowSet
from stages.engine.packing import pack_lengths
from stages.engine.packs import Pack, build_pack, fed_length
from stages.models.loading import architecture
from stages.plan.measure import measure
from stages.plan.memory import LayerwiseShapes, Memory, Shapes, available_bytes, pairs_pack
from stages.runtime.distributed import World
from stages.runtime.malloc import give_back_freed_memory
from stages.train.data_order import epoch_order
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
    """Predicted bytes of a pass over `batch` pairs of `length` tokens; None where the model has too few positions."""

    batch: int
    length: int
    bytes: int | None


@dataclass(frozen=True)
class MeasuredRun:
    """What a few real passes come to; bytes are None where the system does not report them.

    `peak_bytes` is what lives in a step, which is what is predicted; `held_bytes` is what the process holds
    for it, freed memory included. `run_seconds` is the whole run without its evaluations.
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
    """A training run in numbers. `tokens` counts each prompt once; `positions` are those of the largest pack."""

    steps: int
    batch_size: int
    tokens: int
    tokens_per_step: int
    available_bytes: int
    predicted: Memory
    positions: int
    table: list[Cell]
    measured: MeasuredRun | None

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`; bytes and seconds."""
        plain = asdict(self)
        positions = plain.pop("positions")
        plain["predicted"] |= {"total": self.predicted.total, "positions": positions}
        if self.measured is None:
            del plain["measured"]
        return plain


def plan_training(job: Job, measured: bool, say: Callable[[str], None]) -> TrainingPlan:
    """Predict a run from shapes and, with `measured`, from real passes.

    Raises `UsageError` or `MachineError` for settings that cannot be trained with here.
    """
    check_settings(job)
    packs, tokens_per_step = _largest_packs(job, RowSet.of(job.rows, "train"))
    say(f"Predicting memory from the shapes of {job.source.name}")
    predicted = Shapes(job.source, job.settings, job.adapter, job.compute).predict(packs[0])
    tokens = tokens_per_step * job.resolved.steps
    table = _table(job)
    if measured:
        say(f"Measuring {len(packs)} forward and backward passes")
    return TrainingPlan(
        steps=job.resolved.steps,
        batch_size=job.resolved.batch_size,
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        available_bytes=available_bytes(job.compute.device),
        predicted=predicted,
        positions=packs[0].input_ids.shape[1],
        table=table,
        measured=_measure(job, packs, predicted.total, tokens, say) if measured else None,
    )


def _largest_packs(job: Job, rows: RowSet) -> tuple[list[Pack], int]:
    """The largest packs of the first steps, the largest first, and the mean positions of a step."""
    order = epoch_order(rows.mismatch_groups, job.settings.seed, 0)
    size, found, total = job.resolved.batch_size, [], 0
    starts = range(0, len(order), size)[:COUNTED_STEPS]
    for start in starts:
        groups = [rows.example_rows(example, mismatched=False) for example in order[start : start + size]]
        lengths = [fed_length(rows, group) for group in groups]
        if "kl" in job.loss.needs:  # scored as well, without a gradient
            others = [rows.example_rows(example, mismatched=True) for example in order[start : start + size]]
            total += sum(fed_length(rows, group) for group in others if len(group))
        total += sum(lengths)
        for items in pack_lengths(lengths, job.compute.tokens_per_batch):
            found.append((sum(lengths[item] for item in items), [groups[item] for item in items]))
    found.sort(key=lambda entry: -entry[0])
    packs = [build_pack(rows, groups) for _, groups in found[:MEASURED_PACKS]]
    return packs, round(total / max(1, len(starts)))


def _table(job: Job) -> list[Cell]:
    shapes = LayerwiseShapes(job.source, job.settings, job.adapter, job.compute)
    described = architecture(job.source.folder)
    limit = described.get("max_position_embeddings") or max(LENGTHS)
    vocabulary = described.get("vocab_size") or 2

    def predict(batch: int, length: int) -> int | None:
        return shapes.predict(pairs_pack(batch, length, vocabulary)).total if length <= limit else None

    return [Cell(batch, length, predict(batch, length)) for batch in BATCHES for length in LENGTHS]


def _measure(
    job: Job, packs: list[Pack], predicted: int, tokens: int, say: Callable[[str], None]
) -> MeasuredRun:
    if job.compute.device.type == "cpu":
        give_back_freed_memory()
    policy = load_trainable(job, World(), say)
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
