"""Predicts steps, tokens, memory and time of a training run before it starts.

In: the job of a run; its `start` and `reference` are not read. Out: a `TrainingPlan`. Writes nothing. Run it
with `align plan`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stages.data.rows import RowSet
from stages.engine.packs import Pack
from stages.engine.shared_tokens import SharedTokens
from stages.models.fit import num_positions
from stages.models.loading import open_config
from stages.plan.first_steps import FirstSteps
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
BUDGETS = (2048, 4096, 8192, 16384)
MEASURED_PACKS = 3


@dataclass(frozen=True)
class Cell:
    """Predicted bytes of a step over `batch` pairs of `length` tokens; None if the model has too few positions."""

    batch: int
    length: int
    bytes: int | None


@dataclass(frozen=True)
class Budget:
    """What a step computes with this `compute.tokens_per_batch`, and the predicted bytes of its largest pack."""

    tokens_per_batch: int
    tokens_per_step: int
    bytes: int


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

    `positions` is the size of the largest pack. `budgets` has the run's own `tokens_per_batch` and others.
    """

    steps: int
    batch_size: int
    tokens_per_batch: int
    tokens: int
    tokens_per_step: int
    shared: SharedTokens
    available_bytes: int
    predicted: Memory
    positions: int
    budgets: list[Budget]
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
    steps = FirstSteps(job, RowSet.of(job.rows, "train"))
    packed = steps.packed(job.compute.tokens_per_batch, MEASURED_PACKS)
    packs, tokens = packed.largest, packed.tokens_per_step * job.resolved.steps
    log(f"Predicting the memory of {job.source.name} from tensor shapes")
    predicted = Shapes(job.source, job.settings, job.adapter, job.compute).predict(packs[0])
    layerwise = LayerwiseShapes(job.source, job.settings, job.adapter, job.compute)
    budgets, table = _budgets(job, steps, layerwise), _table(job, layerwise)
    if measured:
        log(f"Measuring {len(packs)} forward and backward passes of {job.source.name}")
    return TrainingPlan(
        steps=job.resolved.steps,
        batch_size=job.resolved.batch_size,
        tokens_per_batch=job.compute.tokens_per_batch,
        tokens=tokens,
        tokens_per_step=packed.tokens_per_step,
        shared=steps.shared(),
        available_bytes=available_bytes(job.compute.device),
        predicted=predicted,
        positions=packs[0].input_ids.shape[1],
        budgets=budgets,
        table=table,
        measured=_measure(job, packs, predicted.total, tokens, log) if measured else None,
    )


def _budgets(job: Job, steps: FirstSteps, shapes: LayerwiseShapes) -> list[Budget]:
    """The run's own budget and others; of those that hold a whole step, the smallest alone."""
    found: list[Budget] = []
    for budget in sorted({*BUDGETS, job.compute.tokens_per_batch}):
        packed = steps.packed(budget)
        found.append(Budget(budget, packed.tokens_per_step, shapes.predict(packed.largest[0]).total))
        if packed.whole and budget >= job.compute.tokens_per_batch:
            break
    return found


def _table(job: Job, shapes: LayerwiseShapes) -> list[Cell]:
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
