"""What a training run is made from, and what it comes to in numbers before anything is loaded.

In: rows, a starting model, a reference store, a loss, settings. Out: the `Plan` (steps, rates, cadence) and
the identity that names the policy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache.artifacts import Artifact
from cache.ref_logps import RefLogps
from stages.losses.contract import Loss
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.runtime.context import Context
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.checkpoints import Checkpoint
from stages.train.data_order import num_steps
from stages.train.samples import PromptPool

STAGE_VERSION = 3
NUM_DEFAULT_EVALS = 5
# A rule of thumb: matrices of low rank that start at zero want steps about ten times as large.
ADAPTER_LEARNING_RATE = 10
# Settings that change neither the weights nor the metrics beside them, or that `Plan` fills in.
NOT_HASHED = {
    "learning_rate",
    "batch_size",
    "eval_steps",
    "save_steps",
    "keep_last",
    "gradient_checkpointing",
    "activation_offload",
    "parallel",
    "sample_prompts",
    "sample_strategy",
    "resume",
    "resume_override",
}


@dataclass(frozen=True)
class Plan:
    """The run in numbers, known before anything is loaded."""

    learning_rate: float
    batch_size: int
    steps: int
    steps_per_epoch: int
    eval_steps: int
    save_steps: int


def plan_run(loss: Loss, settings: TrainSettings, num_examples: int, adapter: AdapterSettings) -> Plan:
    """Fill in the loss's recommendations and count the steps."""
    batch_size = settings.batch_size or loss.batch_size
    steps = num_steps(num_examples, batch_size, settings.num_epochs, settings.max_steps)
    eval_steps = settings.eval_steps or max(1, math.ceil(steps / NUM_DEFAULT_EVALS))
    recommended = loss.learning_rate * (1 if adapter.name == "none" else ADAPTER_LEARNING_RATE)
    return Plan(
        learning_rate=settings.learning_rate or recommended,
        batch_size=batch_size,
        steps=steps,
        steps_per_epoch=-(-num_examples // batch_size),
        eval_steps=eval_steps,
        save_steps=settings.save_steps or eval_steps,
    )


@dataclass(frozen=True)
class Job:
    """What a training run is made from; `reference` is None exactly for a loss without `needs_reference`.

    `eval_sets` are rows to evaluate on besides the held-out ones, by name. `origin` is the checkpoint that
    `train.resume` names, `pool` what is sampled while training, if anything is.
    """

    rows: Artifact
    source: ModelSource
    start: dict[str, Any]
    reference: RefLogps | None
    loss: Loss
    settings: TrainSettings
    compute: Compute
    adapter: AdapterSettings
    eval_sets: Mapping[str, Artifact] = field(default_factory=dict)
    origin: Checkpoint | None = None
    pool: PromptPool | None = None

    @property
    def name(self) -> str:
        """Readable part of the policy's folder name."""
        adapter = "" if self.adapter.name == "none" else f"-{self.adapter.name}"
        return f"{self.source.short_name}-{self.loss.model_dump()['name']}{adapter}"

    @property
    def plan(self) -> Plan:
        """The run in numbers."""
        return plan_run(self.loss, self.settings, self.rows.counts["examples"]["train"], self.adapter)

    @property
    def own_identity(self) -> dict[str, Any]:
        """Everything that changes the trained weights or the metrics beside them, but for where the run continues."""
        plan = self.plan
        return {
            "stage_version": STAGE_VERSION,
            "rows": self.rows.fingerprint,
            "reference": self.reference.fingerprint if self.reference else None,
            "start": self.start,
            "loss": self.loss.model_dump(),
            "adapter": None if self.adapter.name == "none" else self.adapter.model_dump(mode="json"),
            "train": {
                **self.settings.model_dump(exclude=NOT_HASHED),
                "learning_rate": plan.learning_rate,
                "batch_size": plan.batch_size,
                "eval_steps": plan.eval_steps,
            },
            "eval_sets": {name: rows.fingerprint for name, rows in self.eval_sets.items()},
            "samples": self.pool.identity if self.pool else None,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """`own_identity`, and the checkpoint of another run that this one continues, if it does."""
        own = self.own_identity
        if self.origin is None or self.origin.state["identity"] == own:
            return own
        return {**own, "continues": {"checkpoint": self.origin.sha256, "step": self.origin.step}}


def find_policy(job: Job, context: Context) -> Artifact | None:
    """The finished policy of this job, if there is one."""
    return context.store.find("policy", job.name, job.identity)
