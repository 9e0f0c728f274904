"""A training run in progress: every step in turn, evaluated, logged and saved.

A loop on torch alone whose unit is the optimizer step: `batch_size` examples, split over ranks and
micro-batches by a token budget without changing a number. Weights are float32 masters, the forward
pass runs under autocast. The order of examples is a function of (seed, epoch), and every decision one of
the lines logged so far, so a run continued from a checkpoint is the uninterrupted one.
"""

import math
import shutil
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
from stages.train.checkpoints import Checkpoint, remove_old, save_checkpoint
from stages.train.data_order import epoch_order
from stages.train.job import Job
from stages.train.monitoring.best_evaluation import Best, best_evaluation, check_metric, eval_name
from stages.train.monitoring.health import Watch
from stages.train.monitoring.metrics_log import METRICS, SAMPLES, Tracker, read_metrics
from stages.train.monitoring.weight_updates import Movement
from stages.train.optimizers import make_optimizer
from stages.train.policy import load_trainable
from stages.train.samples import sample_policy, shown
from stages.train.schedules import make_schedule
from stages.train.signals import StopRequest, stop_at_a_step
from stages.train.step.row_scorer import make_row_scorers
from stages.train.step.step import accumulate_step, evaluate

# While training; two, so that a damaged one costs steps and not the run.
KEPT_CHECKPOINTS = 2


class TrainingDiverged(AlignError):
    """The loss or the gradient is not finite."""

    exit_code = 5


class Run:
    """A training run in progress: policy, optimizer, schedule and where it stands."""

    def __init__(
        self,
        job: Job,
        rows: RowSet,
        eval_sets: Mapping[str, RowSet],
        checkpoint: Checkpoint | None,
        folder: Path,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        """Load the starting weights. `eval_sets` are named as in the log, the held-out rows ''."""
        settings = job.settings
        self.job, self.rows, self.loss, self.settings, self.plan = job, rows, job.loss, settings, job.plan
        self.world, self.folder, self.say, self.checkpoint = world, folder, say, checkpoint
        self.schedule = make_schedule(settings, self.plan.learning_rate, self.plan.steps)
        self.policy = load_trainable(job, world, say)
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
        if summary := self.train_scorer.pairs.summary():
            say(summary)
        self.optimizer = make_optimizer(self.policy.parameters, settings)
        self.movement = Movement(self.policy.parameters)
        self.loss_state: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.audit_difference: float | None = None

    def go(self, tracker: Tracker) -> None:
        """Every remaining step: train, evaluate, log, save, in that order."""
        tracker.begin(self.checkpoint and self.checkpoint.folder)
        if self.checkpoint is None:
            first = {} if self.audit_difference is None else {"audit/max_abs_diff": self.audit_difference}
            self._log(tracker, 0, {**self._evaluate(), **first, **self._sample(tracker, 0)})
        else:
            self._restore(self.checkpoint)
        for key in ("best_metric", "early_stopping_metric"):
            if (metric := getattr(self.settings, key)) is not None:
                check_metric(self.history, metric, f"train.{key}")
        watch = Watch()
        begin = self.history[-1]["step"]
        with (
            progress("train", self.plan.steps - begin, "steps") as advance,
            stop_at_a_step(self.say) as request,
        ):
            for step in range(begin + 1, self.plan.steps + 1):
                if self._stops_early():
                    break
                metrics = self._step(step)
                if step % self.plan.eval_steps == 0 or step == self.plan.steps:
                    metrics.update(self._evaluate())
                metrics.update(self._sample(tracker, step))
                self._log(tracker, step, metrics)
                for warning in watch.new_warnings(self.history):
                    self.say(warning)
                stop = self._is_asked_to_stop(request)
                self._save_if_due(step, stop)
                if stop:
                    self.say(f"Stopped after step {step} of {self.plan.steps}; its checkpoint is written.")
                    request.end()
                advance(1, f"loss {metrics.get('loss', math.nan):.4f}")
        if self.settings.keep_last and not (self.folder / f"checkpoint-{self.last_step}").is_dir():
            self._save(self.last_step)

    @property
    def last_step(self) -> int:
        """The step that was logged last."""
        return self.history[-1]["step"]

    @property
    def best(self) -> Best | None:
        """The best evaluation by `train.best_metric`; None without one."""
        metric = self.settings.best_metric
        return None if metric is None else best_evaluation(self.history, metric)

    def examples_of(self, step: int) -> np.ndarray:
        """Example numbers of a step (1-based): a function of the seed and the step alone."""
        epoch, index = divmod(step - 1, self.plan.steps_per_epoch)
        order = epoch_order(self.rows.cycles, self.settings.seed, epoch)
        return order[index * self.plan.batch_size : (index + 1) * self.plan.batch_size]

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.say(f"Continuing from step {checkpoint.step} of {self.plan.steps} ({checkpoint.folder})")
        self.policy.load_state(checkpoint.folder, self.optimizer)
        self.loss_state = dict(checkpoint.state["loss_state"])
        self.audit_difference = checkpoint.state["audit_max_abs_diff"]
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
            self.movement.remember()
            self.optimizer.step()
            self.loss_state = loss_state
            metrics = {**metrics, "grad_norm": norm, "weights_changed": self.movement.share(self.world)}
        else:
            self._refuse_or_skip(step, metrics["loss"], norm, examples)
            metrics = {"skipped": 1}
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **metrics,
            "learning_rate": rate,
            "epoch": round(step / self.plan.steps_per_epoch, 6),
            "step_seconds": round(time.monotonic() - began, 4),
        }

    def _refuse_or_skip(self, step: int, loss: float, norm: float, examples: np.ndarray) -> None:
        rows = ", ".join(self.rows.sources[self.rows.starts[example]] for example in examples[:8])
        what = (
            f"Step {step}: loss {loss}, gradient norm {norm}. The step holds {len(examples)} examples ({rows}"
        )
        what += ", ...)" if len(examples) > 8 else ")"
        if self.settings.on_nonfinite == "skip":
            self.say(f"{what}. Skipped: the weights stay as they are.")
            return
        raise TrainingDiverged(
            f"{what}. Lower train.learning_rate (now {self.plan.learning_rate:g}), look at these rows, or leave such "
            f"steps out with --set train.on_nonfinite=skip. The same command continues from the last checkpoint."
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
        """Completions of a few prompts where they are due: to console and files; their metrics."""
        every, pool = self.settings.sample_steps, self.job.pool
        if every is None or pool is None or (step % every and step != self.plan.steps):
            return {}
        occasion = -(-step // every)
        records, metrics = sample_policy(
            self.policy.scorer, self.job.source, pool, step, occasion, in_step=self.world.sharded
        )
        self.say("\n".join([f"Samples at step {step}:", *shown(records)]))
        tracker.log_samples(records)
        return metrics

    def _log(self, tracker: Tracker, step: int, metrics: Mapping[str, Any]) -> None:
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
        self.say(
            f"Stopping early after step {self.last_step}: {metric} was best at step {best.step} ({best.value:.4g}), "
            f"{best.evaluations_since} evaluations ago."
        )
        return True

    def _is_asked_to_stop(self, request: StopRequest) -> bool:
        """Whether any rank was signalled; every rank gives the same answer."""
        if self.world.size == 1:
            return bool(request.signum)
        asked = torch.tensor(float(bool(request.signum)), device=self.train_scorer.device)
        return bool(self.world.sum_(asked))

    def _save_if_due(self, step: int, stop: bool) -> None:
        is_last = step == self.plan.steps
        metric = self.settings.best_metric
        evaluated = metric is not None and eval_name(metric) in self.history[-1]
        is_best = evaluated and self.best is not None and self.best.step == step
        if stop or (is_best and not is_last) or (step % self.plan.save_steps == 0 and not is_last):
            self._save(step)

    def _save(self, step: int) -> None:
        state = {
            "loss_state": self.loss_state,
            "audit_max_abs_diff": self.audit_difference,
            "identity": self.job.own_identity,
        }
        save_checkpoint(self.folder, step, state, self._write_state, self.world)
        if self.world.is_main:
            best = [self.best.step] if self.best else []
            remove_old(self.folder, max(KEPT_CHECKPOINTS, self.settings.keep_last), best)

    def _write_state(self, folder: Path) -> None:
        self.policy.save_state(folder, self.optimizer)
        if self.world.is_main:
            for name in (METRICS, SAMPLES):
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)


def _finite(value: Any) -> Any:
    """A metric as JSON has it: NaN and infinities are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
