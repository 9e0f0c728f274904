"""Stage 3 of 4: rows + cached reference log-probs + a loss -> a policy. The reference is never loaded.

A loop on torch alone whose unit is the optimizer step: `batch_size` examples, split over ranks and
micro-batches by a token budget without changing a number. Weights are float32 masters, the forward
pass runs under autocast. The order of examples is a function of (seed, epoch); a run that is typed
again after a crash continues from its newest valid checkpoint. Run it with `align train --loss kto`,
or under `torchrun -m pipeline train`.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.artifacts import Artifact, Draft
from cache.errors import AlignError
from cache.fingerprint import fingerprint
from cache.ref_logps import RefLogps
from stages.audit import audit
from stages.batches import RowScorer
from stages.checkpoints import newest_checkpoint, save_checkpoint
from stages.compute import Compute
from stages.context import Context, progress
from stages.density import DensityRatios
from stages.losses.contract import Loss
from stages.models import ModelSource, check_length, load_model, load_tokenizer
from stages.needs import check_needs
from stages.parallel import World, join_world
from stages.planning import epoch_order, num_steps
from stages.rows import RowSet
from stages.settings import TrackSettings, TrainSettings
from stages.steps import accumulate_step, evaluate
from stages.tracking import Tracker, read_metrics

STAGE_VERSION = 1
METRICS = "metrics.jsonl"
NUM_DEFAULT_EVALS = 5


class TrainingDiverged(AlignError):
    """The loss or the gradient is not finite."""

    exit_code = 5


@dataclass(frozen=True)
class Plan:
    """The run in numbers, known before anything is loaded."""

    learning_rate: float
    batch_size: int
    steps: int
    steps_per_epoch: int
    eval_steps: int
    save_steps: int


def plan_run(loss: Loss, settings: TrainSettings, num_examples: int) -> Plan:
    """Fill in the loss's recommendations and count the steps."""
    batch_size = settings.batch_size or loss.batch_size
    steps = num_steps(num_examples, batch_size, settings.num_epochs, settings.max_steps)
    eval_steps = settings.eval_steps or max(1, math.ceil(steps / NUM_DEFAULT_EVALS))
    return Plan(
        learning_rate=settings.learning_rate or loss.learning_rate,
        batch_size=batch_size,
        steps=steps,
        steps_per_epoch=-(-num_examples // batch_size),
        eval_steps=eval_steps,
        save_steps=settings.save_steps or eval_steps,
    )


@dataclass(frozen=True)
class Job:
    """What a training run is made from; `reference` is None exactly for a loss without `needs_reference`."""

    rows: Artifact
    source: ModelSource
    start: dict[str, Any]
    reference: RefLogps | None
    loss: Loss
    settings: TrainSettings
    compute: Compute

    @property
    def name(self) -> str:
        """Readable part of the policy's folder name."""
        return f"{self.source.short_name}-{self.loss.model_dump()['name']}"

    @property
    def plan(self) -> Plan:
        """The run in numbers."""
        return plan_run(self.loss, self.settings, self.rows.counts["examples"]["train"])

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that changes the trained weights or the metrics beside them."""
        exclude = {"learning_rate", "batch_size", "eval_steps", "save_steps", "gradient_checkpointing"}
        plan = self.plan
        return {
            "stage_version": STAGE_VERSION,
            "rows": self.rows.fingerprint,
            "reference": self.reference.fingerprint if self.reference else None,
            "start": self.start,
            "loss": self.loss.model_dump(),
            "train": {
                **self.settings.model_dump(exclude=exclude),
                "learning_rate": plan.learning_rate,
                "batch_size": plan.batch_size,
                "eval_steps": plan.eval_steps,
            },
        }


def find_policy(job: Job, context: Context) -> Artifact | None:
    """The finished policy of this job, if there is one."""
    return context.store.find("policy", job.name, job.identity)


def train(job: Job, track: TrackSettings, context: Context) -> Artifact:
    """Train the policy and return its artifact. Raises an `AlignError` before anything is loaded if it cannot."""
    rows, source, reference, loss, compute = job.rows, job.source, job.reference, job.loss, job.compute
    check_needs(loss, rows, job.settings.pairs, context)
    train_rows, heldout = RowSet.of(rows, "train"), RowSet.of(rows, "heldout")
    if reference is not None:
        keys = (
            [*train_rows.keys, *heldout.keys] if loss.needs_mismatched else _matched_keys(train_rows, heldout)
        )
        reference.require(keys, context.command("cache-ref"))
    check_length(source.folder, max(train_rows.max_length(), heldout.max_length()))
    world = join_world(compute.device)
    draft = context.store.draft("policy", job.name, "train", job.identity, keep=True)
    say = context.say if world.is_main else _silent
    run = _Run(job, train_rows, heldout, world, draft, say)
    if reference is not None and fingerprint(job.start) == reference.fingerprint:
        run.audit_difference = audit(run.scorer, heldout if heldout.num_examples else train_rows, reference)
        say(
            f"Audit: the cached reference and the untouched policy agree within {run.audit_difference:.2g} nats a token"
        )
    tracker = (
        Tracker(draft.path / METRICS, track, draft.final.name, job.identity, run.last_step)
        if world.is_main
        else None
    )
    try:
        run.go(tracker)
    finally:
        if tracker is not None:
            tracker.close()
    if world.is_main:
        _finish(run, source, context)
    world.barrier()
    artifact = find_policy(job, context)
    assert artifact is not None, "the policy was published under another name"
    return artifact


def _matched_keys(*row_sets: RowSet) -> list[bytes]:
    return [
        key
        for rows in row_sets
        for key, role in zip(rows.keys, rows.roles, strict=True)
        if role != "mismatched"
    ]


class _Run:
    """A training run in progress: model, optimizer, schedule and where it stands."""

    audit_difference: float | None = None

    def __init__(
        self, job: Job, rows: RowSet, heldout: RowSet, world: World, draft: Draft, say: Callable[[str], None]
    ) -> None:
        from stages.scoring import (
            Scorer,
        )  # brings transformers' modelling code: only when there is something to train

        settings = job.settings
        self.rows, self.loss, self.settings, self.plan = rows, job.loss, settings, job.plan
        self.world, self.draft = world, draft
        ratios = DensityRatios(rows) if job.loss.needs_density_ratios else None
        self.model = load_model(job.source, job.compute)
        self.scorer = Scorer(self.model, job.compute, say, settings.gradient_checkpointing)
        self.train_scorer, self.heldout_scorer = (
            RowScorer(
                self.scorer,
                split,
                job.reference,
                job.loss,
                world,
                settings.pairs,
                ratios and ratios.of(split),
            )
            for split in (rows, heldout)
        )
        if summary := self.train_scorer.pairs.summary():
            say(summary)
        self.eval_examples = range(min(heldout.num_examples, settings.eval_samples or heldout.num_examples))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.parameters, settings)
        self.schedule = _schedule(settings, self.plan.steps)
        self.loss_state: dict[str, float] = {}
        self.checkpoint = newest_checkpoint(draft.path, say)
        if self.checkpoint is not None:
            say(f"Continuing from step {self.checkpoint.step} of {self.plan.steps}")

    @property
    def last_step(self) -> int:
        """The last step that is already done and logged; -1 before the evaluation at step 0."""
        return -1 if self.checkpoint is None else self.checkpoint.step

    def go(self, tracker: Tracker | None) -> None:
        """Every remaining step: train, evaluate, log, save, in that order."""
        if self.checkpoint is None:
            self._log(tracker, 0, self._evaluate())
        else:
            self.checkpoint.load(self.model, self.optimizer)
            self.loss_state = self.checkpoint.loss_state
        first = max(self.last_step, 0)
        with progress("train", self.plan.steps - first, "steps") as advance:
            for step in range(first + 1, self.plan.steps + 1):
                metrics = self._step(step)
                if step % self.plan.eval_steps == 0 or step == self.plan.steps:
                    metrics.update(self._evaluate())
                self._log(tracker, step, metrics)
                if step % self.plan.save_steps == 0 and step != self.plan.steps and self.world.is_main:
                    save_checkpoint(self.draft.path, step, self.model, self.optimizer, self.loss_state)
                advance(1, f"loss {metrics['loss']:.4f}")

    def examples_of(self, step: int) -> np.ndarray:
        """Example numbers of a step (1-based): a function of the seed and the step alone."""
        epoch, index = divmod(step - 1, self.plan.steps_per_epoch)
        order = epoch_order(self.rows.cycles, self.settings.seed, epoch)
        return order[index * self.plan.batch_size : (index + 1) * self.plan.batch_size]

    def _step(self, step: int) -> dict[str, float]:
        began = time.monotonic()
        rate = self.plan.learning_rate * self.schedule(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        examples = self.examples_of(step)
        metrics, self.loss_state = accumulate_step(
            self.train_scorer, self.loss, examples.tolist(), self.loss_state
        )
        self.world.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        self._check_finite(step, metrics["loss"], float(norm), examples)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        epoch = (step - 1) // self.plan.steps_per_epoch + (
            (step - 1) % self.plan.steps_per_epoch + 1
        ) / self.plan.steps_per_epoch
        return {
            **metrics,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "epoch": round(epoch, 6),
            "step_seconds": round(time.monotonic() - began, 4),
        }

    def _check_finite(self, step: int, loss: float, norm: float, examples: np.ndarray) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = ", ".join(self.rows.sources[self.rows.starts[example]] for example in examples[:8])
        raise TrainingDiverged(
            f"Step {step}: loss {loss}, gradient norm {norm}. The step holds {len(examples)} examples ({rows}, ...). "
            f"Lower train.learning_rate (now {self.plan.learning_rate:g}) or look at these rows; the run continues from its last checkpoint."
        )

    def _evaluate(self) -> dict[str, float]:
        if not len(self.eval_examples):
            return {}
        metrics = evaluate(self.heldout_scorer, self.loss, list(self.eval_examples), self.loss_state)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _log(self, tracker: Tracker | None, step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            extra = (
                {"audit/max_abs_diff": self.audit_difference}
                if step == 0 and self.audit_difference is not None
                else {}
            )
            tracker.log(step, {**metrics, **extra})


def _finish(run: _Run, source: ModelSource, context: Context) -> None:
    """Save the policy as a Hugging Face folder and publish the artifact."""
    folder: Path = run.draft.path
    run.model.set_attn_implementation("sdpa")
    run.model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    lines = read_metrics(folder / METRICS)
    evaluations = [
        {name: value for name, value in line.items() if name.startswith("eval/")} for line in lines
    ]
    evaluations = [values for values in evaluations if values]
    for leftover in [*folder.glob("checkpoint-*"), *folder.glob(".tmp-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    counts = {
        "steps": run.plan.steps,
        "examples": run.rows.num_examples,
        "step0": _plain(evaluations[0]) if evaluations else {},
        "final": _plain(evaluations[-1]) if evaluations else {},
        "audit_max_abs_diff": run.audit_difference,
    }
    context.store.publish(run.draft, counts, {}, context.config_text, policy=source.name)


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}


def _silent(line: str) -> None:
    """Ranks other than the first say nothing."""


def _optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=betas,
        eps=settings.adam_epsilon,
        fused=True,
    )


def _schedule(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate as a pure function of the step, from transformers' schedulers."""
    from transformers import get_scheduler

    idle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    warmup = math.ceil(steps * settings.warmup_ratio)
    scheduler: Any = get_scheduler(
        settings.lr_scheduler_type, idle, num_warmup_steps=warmup, num_training_steps=steps
    )
    return scheduler.lr_lambdas[0]
