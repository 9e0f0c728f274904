"""The training loop: every step in turn, with evaluation, logging, sampling and checkpoints.

In: a `Job`, its rows, a checkpoint to continue from.  Out: a trained `Run`, which `publish.py` publishes. A step is
`batch_size` examples, split over ranks and packs by a token budget without an effect on the results. Weights are
float32 master weights; the forward pass runs under autocast. The order of the examples is a function of (seed, epoch),
and every decision (early stopping, best evaluation, warnings) is a function of the lines logged so far, so a run
continued from a checkpoint equals an uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.errors import AlignError
from stages.data.rows import RowSet
from stages.runtime.context import progress
from stages.runtime.distributed import World
from stages.train.checkpoints import Checkpoint, RunState, remove_old, save_checkpoint
from stages.train.job import Job
from stages.train.monitoring.best_evaluation import Best, best_evaluation, check_metric, eval_name
from stages.train.monitoring.health import Watch
from stages.train.monitoring.metrics_log import METRICS, Tracker, copy_logs, read_metrics
from stages.train.monitoring.weight_updates import WeightUpdates
from stages.train.optimizers import make_optimizer
from stages.train.policy import load_trainable
from stages.train.samples import console_lines, sample_policy
from stages.train.schedules import make_schedule
from stages.train.signals import StopRequest, stop_at_a_step
from stages.train.step.row_scorer import make_row_scorers
from stages.train.step.step import accumulate_step, evaluate

# Checkpoints kept while training; two, so that a damaged one costs some steps and not the whole run.
KEPT_CHECKPOINTS = 2
SHOWN_WHILE_TRAINING = (("eval/rewards/accuracies", "held-out accuracy"), ("eval/rewards/margins", "margin"))


class TrainingDiverged(AlignError):
    """The loss or the gradient of a step is not finite."""

    exit_code = 5


class Run:
    """A training run in progress: policy, optimizer, learning rates, and the lines logged so far (`history`)."""

    def __init__(
        self,
        job: Job,
        rows: RowSet,
        eval_sets: Mapping[str, RowSet],
        checkpoint: Checkpoint | None,
        folder: Path,
        world: World,
        log: Callable[[str], None],
    ) -> None:
        """Load the starting weights. `eval_sets` are evaluation sets by name; the name of the held-out rows is ''."""
        settings = job.settings
        self.job, self.rows, self.loss, self.settings, self.resolved = (
            job,
            rows,
            job.loss,
            settings,
            job.resolved,
        )
        self.world, self.folder, self.log, self.checkpoint = world, folder, log, checkpoint
        self.schedule = make_schedule(settings, self.resolved.learning_rate, self.resolved.steps)
        self._order = job.data_order(rows)
        self.policy = load_trainable(job, world, log)
        filled = {name: split for name, split in eval_sets.items() if len(split)}
        self.train_scorer, *eval_scorers = make_row_scorers(
            self.policy.scorer,
            [rows, *filled.values()],
            job.reference,
            job.loss,
            world,
            settings.pairs,
            lambda: rows,
        )
        self.eval_scorers = dict(zip(filled, eval_scorers, strict=True))
        for summary in (self.train_scorer.pairs.summary(), self._order.summary()):
            if summary:
                log(summary)
        self.optimizer = make_optimizer(self.policy.parameters, settings)
        self.weight_updates = WeightUpdates(self.policy.parameters)
        self.loss_state: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.audit_difference: float | None = None

    def go(self, tracker: Tracker, audit_difference: float | None) -> None:
        """Run every remaining step: train, evaluate, log, save, in this order.

        `audit_difference` is the result of the audit at step 0, in nats per token; None if there was no audit.
        """
        self._begin(tracker, audit_difference)
        watch, begin = Watch(self.loss), self.last_step
        with (
            progress("train", self.resolved.steps, "steps", done=begin) as advance,
            stop_at_a_step(self.log) as request,
        ):
            for step in range(begin + 1, self.resolved.steps + 1):
                if self._stops_early():
                    break
                metrics = self._step(step)
                if step % self.resolved.eval_steps == 0 or step == self.resolved.steps:
                    metrics.update(self._evaluate())
                metrics.update(self._sample(tracker, step))
                self._log_metrics(tracker, step, metrics)
                for warning in watch.new_warnings(self.history):
                    self.log(warning)
                stop = self._must_stop(request)
                self._save_if_due(step, stop)
                if stop:
                    self.log(
                        f"Stopped after step {step} of {self.resolved.steps}; its checkpoint is written."
                    )
                    request.end()
                advance(1, self._progress_note())
        if self.settings.keep_last and not (self.folder / f"checkpoint-{self.last_step}").is_dir():
            self._save(self.last_step)

    @property
    def last_step(self) -> int:
        """The newest logged step."""
        return self.history[-1]["step"]

    @property
    def best(self) -> Best | None:
        """The best evaluation by `train.best_metric`; None if that is not set or nothing is evaluated yet."""
        metric = self.settings.best_metric
        return None if metric is None else best_evaluation(self.history, metric)

    def examples_of(self, step: int) -> np.ndarray:
        """Example numbers of a step, (examples,); steps count from 1. A function of the seed and the step alone."""
        return self._order.examples_of(step)

    def _progress_note(self) -> str:
        """What a person wants to see while training: loss, rate, held-out accuracy and margin."""
        line = self.history[-1]
        note = f"loss {line.get('loss') or math.nan:.4f}"
        for metric, label in SHOWN_WHILE_TRAINING:
            value = next(
                (line[metric] for line in reversed(self.history) if line.get(metric) is not None), None
            )
            note += "" if value is None else f", {label} {value:.3f}"
        rate = len(self.examples_of(self.last_step)) / max(line["step_seconds"], 1e-4)
        return f"{note}, {rate:,.0f} examples/s"

    def _begin(self, tracker: Tracker, audit_difference: float | None) -> None:
        """Evaluate at step 0, or restore the checkpoint."""
        tracker.begin(None if self.checkpoint is None else self.checkpoint.folder)
        if self.checkpoint is None:
            self.audit_difference = audit_difference
            if self.job.beginning is not None:
                self._begin_from(self.job.beginning)
            first = {} if audit_difference is None else {"audit/max_abs_diff": audit_difference}
            self._log_metrics(tracker, 0, {**self._evaluate(), **first, **self._sample(tracker, 0)})
        else:
            self._restore(self.checkpoint)
        check_metric(self.history, self.settings.best_metric, "train.best_metric")
        check_metric(self.history, self.settings.early_stopping_metric, "train.early_stopping_metric")

    def _begin_from(self, beginning: Checkpoint) -> None:
        """Take over weights, optimizer and loss of another run, after the audit, which is about the model itself."""
        self.log(f"Beginning with the weights and the optimizer of {beginning.folder}")
        self.policy.load_state(beginning.folder, self.optimizer)
        self.loss_state = dict(beginning.state.loss_state)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.log(f"Continuing from step {checkpoint.step} of {self.resolved.steps} ({checkpoint.folder})")
        self.policy.load_state(checkpoint.folder, self.optimizer)
        self.loss_state = dict(checkpoint.state.loss_state)
        self.audit_difference = checkpoint.state.audit_max_abs_diff
        self.history = read_metrics(checkpoint.folder / METRICS)

    def _step(self, step: int) -> dict[str, Any]:
        began = time.monotonic()
        rate = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        examples = self.examples_of(step)
        metrics, loss_state = accumulate_step(
            self.train_scorer, self.loss, examples.tolist(), self.loss_state
        )
        self.policy.sum_gradients()
        norm = self.policy.clip_gradients(self.settings.max_grad_norm)
        if math.isfinite(metrics["loss"]) and math.isfinite(norm):
            self.weight_updates.before_step()
            self.optimizer.step()
            self.loss_state = loss_state
            metrics = {
                **metrics,
                "grad_norm": norm,
                **self.weight_updates.shares(self.world, rate),
            }
        else:
            self._refuse_or_skip(step, metrics["loss"], norm, examples)
            metrics = {"skipped": 1}
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **metrics,
            "learning_rate": rate,
            "epoch": round(step / self.resolved.steps_per_epoch, 6),
            "step_seconds": round(time.monotonic() - began, 4),
        }

    def _refuse_or_skip(self, step: int, loss: float, norm: float, examples: np.ndarray) -> None:
        rows = ", ".join(self.rows.sources[self.rows.starts[example]] for example in examples[:8])
        what = (
            f"Step {step} has loss {loss} and gradient norm {norm}. Its {len(examples)} examples are ({rows}"
        )
        what += ", ...)" if len(examples) > 8 else ")"
        if self.settings.on_nonfinite == "skip":
            self.log(f"{what}. The step is skipped: the weights stay as they are.")
            return
        raise TrainingDiverged(
            f"{what}. Lower train.learning_rate (now {self.resolved.learning_rate:g}), check these rows, or skip such "
            f"steps with --set train.on_nonfinite=skip. The same command continues from the last checkpoint."
        )

    def _evaluate(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, scorer in self.eval_scorers.items():
            number = min(scorer.rows.num_examples, self.settings.eval_samples or scorer.rows.num_examples)
            metrics = evaluate(scorer, self.loss, range(number), self.loss_state)
            prefix = f"eval/{name}/" if name else "eval/"
            found.update({f"{prefix}{metric}": value for metric, value in metrics.items()})
        return found

    def _sample(self, tracker: Tracker, step: int) -> dict[str, float]:
        """Sample a few prompts if samples are due at this step, show and log the completions; return their metrics."""
        every, pool = self.settings.sample_steps, self.job.pool
        if every is None or pool is None or (step % every and step != self.resolved.steps):
            return {}
        round_index = -(-step // every)
        records, metrics = sample_policy(
            self.policy.scorer, self.job.source, pool, step, round_index, synced_ranks=self.world.sharded
        )
        self.log("\n".join([f"Samples at step {step}:", *console_lines(records)]))
        tracker.log_samples([vars(record) for record in records])
        return metrics

    def _log_metrics(self, tracker: Tracker, step: int, metrics: Mapping[str, Any]) -> None:
        line = {"step": step, **{name: _finite(value) for name, value in metrics.items()}}
        self.history.append(line)
        tracker.log(line)

    def _stops_early(self) -> bool:
        metric = self.settings.early_stopping_metric
        if metric is None or eval_name(metric) not in self.history[-1]:
            return False
        best = best_evaluation(self.history, metric)
        if best is None or best.evaluations_since < self.settings.early_stopping_patience:
            return False
        self.log(
            f"Early stop after step {self.last_step}: {metric} was best at step {best.step} ({best.value:.4g}), "
            f"{best.evaluations_since} evaluations ago."
        )
        return True

    def _must_stop(self, request: StopRequest) -> bool:
        """Whether any rank has received a signal to stop; all ranks return the same."""
        if self.world.size == 1:
            return bool(request.signum)
        signalled = torch.tensor(float(bool(request.signum)), device=self.train_scorer.device)
        return bool(self.world.sum_(signalled))

    def _save_if_due(self, step: int, stop: bool) -> None:
        is_last = step == self.resolved.steps
        metric = self.settings.best_metric
        evaluated = metric is not None and eval_name(metric) in self.history[-1]
        is_best = evaluated and self.best is not None and self.best.step == step
        if stop or (is_best and not is_last) or (step % self.resolved.save_steps == 0 and not is_last):
            self._save(step)

    def _save(self, step: int) -> None:
        state = RunState(self.loss_state, self.audit_difference, self.job.own_identity)
        save_checkpoint(self.folder, step, state, self._write_state, self.world)
        if self.world.is_main:
            best = [self.best.step] if self.best else []
            remove_old(self.folder, max(KEPT_CHECKPOINTS, self.settings.keep_last), best)

    def _write_state(self, folder: Path) -> None:
        self.policy.save_state(folder, self.optimizer)
        if self.world.is_main:
            copy_logs(self.folder, folder)


def _finite(value: Any) -> Any:
    """A metric as JSON has it: null for NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
