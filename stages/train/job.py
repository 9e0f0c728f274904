"""A training run before anything is loaded: its inputs, its resolved numbers, its identity.

In: rows, a starting model, a reference store, a loss, settings.  Out: `ResolvedRun` (steps, rates, intervals) and the
identity that names the policy.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact, open_artifact
from cache.errors import AlignError
from cache.fingerprint import canonical_json
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.losses.contract import Loss
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.runtime.context import Context
from stages.settings.train import AdapterSettings, TrainSettings
from stages.train.checkpoints import Checkpoint
from stages.train.conversations import conversations
from stages.train.data_order import DataOrder, num_steps
from stages.train.samples import PromptPool
from stages.train.without_effect import effective_adapter, effective_train

STAGE_VERSION = 5
NUM_DEFAULT_EVALS = 5
# Settings that change neither the weights nor the metrics, those that `ResolvedRun` replaces in the identity, and one
# that the identity has where it is set.
NOT_HASHED = {
    "name",
    "model_card",
    "keep_together",
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
    "begin_from",
}


@dataclass(frozen=True)
class ResolvedRun:
    """Numbers of a run after defaults are filled in and steps are counted; intervals in steps."""

    learning_rate: float
    batch_size: int
    steps: int
    steps_per_epoch: int
    eval_steps: int
    save_steps: int


def resolve_run(
    loss: Loss, settings: TrainSettings, num_examples: int, adapter: AdapterSettings
) -> ResolvedRun:
    """Fill in the defaults of the loss and count the steps."""
    filled = settings.resolved(loss.learning_rate, loss.batch_size, adapter)
    assert filled.learning_rate is not None
    assert filled.batch_size is not None
    steps = num_steps(num_examples, filled.batch_size, settings.num_epochs, settings.max_steps)
    eval_steps = settings.eval_steps or max(1, math.ceil(steps / NUM_DEFAULT_EVALS))
    return ResolvedRun(
        learning_rate=filled.learning_rate,
        batch_size=filled.batch_size,
        steps=steps,
        steps_per_epoch=-(-num_examples // filled.batch_size),
        eval_steps=eval_steps,
        save_steps=settings.save_steps or eval_steps,
    )


@dataclass(frozen=True)
class Job:
    """The inputs of a training run.

    `start` is the identity of the starting weights; `reference` is None exactly if the loss needs none; `eval_sets` are
    evaluation sets by name, besides the held-out rows; `origin` is the checkpoint that `train.resume` names, `beginning`
    that of `train.begin_from`; `pool` has the prompts to sample while training, if `train.sample_steps` is set.
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
    beginning: Checkpoint | None = None
    pool: PromptPool | None = None

    @property
    def name(self) -> str:
        """Readable part of the policy's folder name."""
        adapter = "" if self.adapter.name == "none" else f"-{self.adapter.name}"
        return f"{self.source.short_name}-{self.loss.model_dump()['name']}{adapter}"

    @property
    def resolved(self) -> ResolvedRun:
        """The numbers of the run."""
        return resolve_run(self.loss, self.settings, self.rows.counts["examples"]["train"], self.adapter)

    def data_order(self, rows: RowSet) -> DataOrder:
        """The order of the training rows."""
        kept = self.settings.keep_together is not None
        together = conversations(rows, self.rows.counts["turn_end_ids"]) if kept else None
        return DataOrder(rows.mismatch_groups, self.settings.seed, self.resolved.batch_size, together)

    @property
    def own_identity(self) -> dict[str, Any]:
        """Everything that changes the trained weights or the metrics, except the checkpoint that the run continues."""
        resolved = self.resolved
        sizes = [self.rows.counts["examples"]["heldout"]]
        sizes += [rows.counts["examples"]["train"] for rows in self.eval_sets.values()]
        settings = effective_train(self.settings, resolved.steps_per_epoch, max(sizes))
        adapter = effective_adapter(self.adapter).model_dump(mode="json")
        return {
            "stage_version": STAGE_VERSION,
            "rows": self.rows.fingerprint,
            "reference": None if self.reference is None else self.reference.fingerprint,
            "start": self.start,
            "loss": self.loss.model_dump(),
            "adapter": None if self.adapter.name == "none" else adapter,
            "train": {
                **settings.model_dump(exclude=NOT_HASHED),
                "learning_rate": resolved.learning_rate,
                "batch_size": resolved.batch_size,
                "eval_steps": min(resolved.eval_steps, resolved.steps),
                **({"keep_together": self.settings.keep_together} if self.settings.keep_together else {}),
            },
            "eval_sets": {name: rows.fingerprint for name, rows in self.eval_sets.items()},
            "samples": self.pool.identity if self.pool else None,
            **({"begins_from": self.beginning.sha256} if self.beginning else {}),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """`own_identity`, and the checkpoint of another run that this run continues, if there is one."""
        own = self.own_identity
        if self.origin is None or self.origin.state.identity == own:
            return own
        return {**own, "continues": {"checkpoint": self.origin.sha256, "step": self.origin.step}}


def find_policy(job: Job, context: Context) -> Artifact | None:
    """The finished policy of this job, if there is one."""
    return context.store.find("policy", job.name, job.identity)


def find_policy_of_other_eval_sets(job: Job, context: Context) -> Path | None:
    """The folder of a finished policy that differs from that of this job in its evaluation sets alone, if there is one."""
    wanted = canonical_json({**job.identity, "eval_sets": None})
    for folder in sorted((context.store.root / "policy").glob(f"{job.name}-*")):
        with suppress(AlignError):
            if canonical_json({**open_artifact(folder).manifest["identity"], "eval_sets": None}) == wanted:
                return folder
    return None
