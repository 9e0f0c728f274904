"""A training run in progress: every step in turn, evaluated, logged and saved.

A loop on torch alone whose unit is the optimizer step: `batch_size` examples, split over ranks and
micro-batches by a token budget without changing a number. Weights are float32 masters, the forward
pass runs under autocast. The order of examples is a function of (seed, epoch).
"""

import math
import time
from collections.abc import Callable

import numpy as np

from cache.artifacts import Draft
from cache.errors import AlignError
from stages.batches import RowScorer
from stages.checkpoints import newest_checkpoint, save_checkpoint
from stages.context import progress
from stages.density import DensityRatios
from stages.job import Job
from stages.optimizers import make_optimizer
from stages.parallel import World
from stages.planning import epoch_order
from stages.rows import RowSet
from stages.schedules import make_schedule
from stages.steps import accumulate_step, evaluate
from stages.tracking import Tracker
from stages.trainable import load_trainable

METRICS = "metrics.jsonl"


class TrainingDiverged(AlignError):
    """The loss or the gradient is not finite."""

    exit_code = 5


class Run:
    """A training run in progress: model, optimizer, schedule and where it stands."""

    audit_difference: float | None = None

    def __init__(
        self, job: Job, rows: RowSet, heldout: RowSet, world: World, draft: Draft, say: Callable[[str], None]
    ) -> None:
        settings = job.settings
        self.rows, self.loss, self.settings, self.plan = rows, job.loss, settings, job.plan
        self.world, self.draft = world, draft
        ratios = DensityRatios(rows) if job.loss.needs_density_ratios else None
        self.policy = load_trainable(job, world, say)
        self.scorer = self.policy.scorer
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
        self.optimizer = make_optimizer(self.policy.parameters, settings)
        self.schedule = make_schedule(settings, self.plan.steps)
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
            self.policy.load_state(self.checkpoint.folder, self.optimizer)
            self.loss_state = self.checkpoint.loss_state
        first = max(self.last_step, 0)
        with progress("train", self.plan.steps - first, "steps") as advance:
            for step in range(first + 1, self.plan.steps + 1):
                metrics = self._step(step)
                if step % self.plan.eval_steps == 0 or step == self.plan.steps:
                    metrics.update(self._evaluate())
                self._log(tracker, step, metrics)
                if step % self.plan.save_steps == 0 and step != self.plan.steps:
                    save_checkpoint(
                        self.draft.path,
                        step,
                        {"loss_state": self.loss_state},
                        lambda folder: self.policy.save_state(folder, self.optimizer),
                        self.world,
                    )
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
        self.policy.sum_gradients()
        norm = self.policy.clip_gradients(self.settings.max_grad_norm)
        self._check_finite(step, metrics["loss"], norm, examples)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        epoch = (step - 1) // self.plan.steps_per_epoch + (
            (step - 1) % self.plan.steps_per_epoch + 1
        ) / self.plan.steps_per_epoch
        return {
            **metrics,
            "grad_norm": norm,
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
