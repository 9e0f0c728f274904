"""Every reason to refuse a training run that shows before a model is loaded, and the order they are looked at in.

In: a job and its rows.  Out: nothing, or an `AlignError` that says what to change.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cache.artifacts import Artifact
from cache.errors import DataError, MachineError, StaleError, UsageError
from stages.data.rows import RowSet
from stages.losses import LOSSES
from stages.losses.contract import Loss
from stages.models.adapters import check_adapter
from stages.models.loading import check_length
from stages.runtime.compute import require_bitsandbytes
from stages.runtime.context import Context
from stages.settings.train import PairStrategy
from stages.train.job import Job
from stages.train.optimizers import NEEDS_BITSANDBYTES, NOT_SHARDED
from stages.train.resume import differing_settings
from stages.train.schedules import make_schedule

# What may differ from the run that is continued: it changes how far and how closely watched, not the steps taken.
MAY_CHANGE = (
    "train.max_steps",
    "train.eval_steps",
    "train.eval_samples",
    "train.best_metric",
    "train.save_best",
    "train.early_stopping_metric",
    "train.early_stopping_patience",
    "train.on_nonfinite",
    "train.sample_steps",
    "eval_sets",
    "samples",
)


def preflight(job: Job, rows: RowSet, eval_rows: Mapping[str, RowSet], context: Context) -> None:
    """Raise an `AlignError` for a run that cannot work: its data, settings, checkpoint to continue, reference, lengths."""
    settings = job.settings
    for artifact in (job.rows, *job.eval_sets.values()):
        check_data(job.loss, artifact, settings.pairs, context)
    if settings.save_best and settings.best_metric is None:
        raise UsageError(
            "train.save_best publishes the best evaluation by train.best_metric, which is not set. "
            "For example: --set train.best_metric=rewards/accuracies"
        )
    check_settings(job)
    if job.origin is not None:
        _check_origin(job, context)
    make_schedule(settings, job.plan.learning_rate, job.plan.steps)
    check_rows(job, [rows, *eval_rows.values()], job.source.folder, context)


def check_rows(job: Job, row_sets: Iterable[RowSet], model_folder: Path, context: Context) -> None:
    """Raise `StaleError` for rows without the reference log-probs the loss needs, `UsageError` for rows too long."""
    row_sets = list(row_sets)
    if job.reference is not None:
        keys = [key for row_set in row_sets for key in row_set.scored_keys("kl" in job.loss.needs)]
        job.reference.require(keys, context.command("cache-ref"))
    check_length(model_folder, max(row_set.max_length() for row_set in row_sets))


def check_settings(job: Job) -> None:
    """Raise `UsageError` or `MachineError` with what to change."""
    settings, compute = job.settings, job.compute
    sharded = settings.parallel == "fsdp"
    if compute.load_in_4bit and job.adapter.name == "none":
        raise UsageError(
            "compute.load_in_4bit freezes the model's own weights, so there is nothing to train. "
            "Train an adapter with --set adapter.name=lora, or leave the weights whole."
        )
    if sharded and compute.load_in_4bit:
        raise UsageError(
            "train.parallel=fsdp cannot shard 4-bit weights. Use --set train.parallel=ddp: the 4-bit model is small."
        )
    if settings.optimizer in NEEDS_BITSANDBYTES:
        require_bitsandbytes(f"train.optimizer={settings.optimizer}")
    if sharded and settings.optimizer in NOT_SHARDED:
        raise UsageError(
            f"train.optimizer={settings.optimizer} cannot keep sharded state. With train.parallel=fsdp use adamw or "
            f"adamw_bf16."
        )
    if settings.optimizer == "paged_adamw_8bit" and compute.device.type != "cuda":
        raise MachineError(
            "train.optimizer=paged_adamw_8bit pages between a GPU and the host, and there is no GPU. Use adamw_8bit."
        )
    if settings.activation_offload and compute.device.type != "cuda":
        raise MachineError(
            f"train.activation_offload moves activations off a GPU, and compute.device is {compute.device.type}. "
            f"Leave it out."
        )
    check_adapter(job.adapter, job.source)


def check_data(loss: Loss, rows: Artifact, pairs: PairStrategy, context: Context) -> None:
    """Raise an `AlignError` naming what the data lacks for this loss and the command that adds it."""
    roles = rows.counts["rows_by_role"]
    name = loss.model_dump()["name"]
    if loss.unit == "pair" and not roles.get("chosen") and not roles.get("ranked"):
        others = [other for other, cls in LOSSES.items() if cls.unit == "row"]
        raise UsageError(
            f"Loss {name} is computed on pairs of a chosen and a rejected completion, and {rows.path} has none. "
            f"Losses for unpaired data: {', '.join(others)}."
        )
    if "kl" in loss.needs and not roles.get("mismatched"):
        extra = "--set prepare.mismatched=true"
        raise StaleError(
            f"Loss {name} needs mismatched rows, and {rows.path} has none. "
            f"Run: {context.command('prepare', extra)}, then cache-ref with the same option."
        )
    unscored = (
        sum(count for role, count in roles.items() if role != "mismatched") - rows.counts["scored_rows"]
    )
    if "scores" in loss.needs and unscored:
        raise DataError(
            f"Loss {name} needs a score for each completion, and {unscored} in {rows.path} have none. "
            f"Use data with columns score_chosen and score_rejected, or graded responses."
        )
    if rows.counts["weighted_rows"] and "weights" not in loss.needs:
        others = [other for other, cls in LOSSES.items() if "weights" in cls.always_needs]
        raise UsageError(
            f"Loss {name} takes no weights, and {rows.counts['weighted_rows']:,} rows in {rows.path} have one other than 1. "
            f"Losses that do: {', '.join(others)}. Or prepare the data without them (data.ties=drop; no weight columns)."
        )
    if "density_ratios" in loss.needs and (roles.get("chosen") or roles.get("ranked")):
        raise UsageError(
            f"Loss {name} with udm weights undesirable completions by how their prompts differ from those of desirable "
            f"ones, and in {rows.path} both have the same prompts. Leave udm out, or use unpaired data."
        )
    if pairs != "best_worst":
        _check_pairs(loss, name, rows, pairs)


def _check_pairs(loss: Loss, name: str, rows: Artifact, pairs: PairStrategy) -> None:
    """Other strategies than best_worst want ranked lists, and losses for which a row may be in many pairs."""
    if not rows.counts["rows_by_role"].get("ranked"):
        raise UsageError(
            f"train.pairs={pairs} forms pairs from ranked lists, and {rows.path} has none. "
            f"Use --set train.pairs=best_worst, or keep the lists of graded data with --set prepare.graded=ranked."
        )
    if "desirable" in loss.needs:
        raise UsageError(
            f"Loss {name} takes each completion as desirable or not, which of a ranked list only the best and the "
            f"worst are, and train.pairs is {pairs}. Use --set train.pairs=best_worst."
        )
    if "shared_logps" in loss.needs:
        raise UsageError(
            f"Loss {name} with ld_alpha cuts a completion to the length of the one it is compared with; "
            f"with train.pairs={pairs} there are several. Use --set train.pairs=best_worst, or leave ld_alpha out."
        )


def _check_origin(job: Job, context: Context) -> None:
    """Raise `StaleError` naming every field in which the job differs from its origin and may not."""
    assert job.origin is not None, "a run without train.resume has no origin"
    assert job.origin.state.identity is not None, "open_origin refuses checkpoints without one"
    differing = differing_settings(job.origin.state.identity, job.own_identity)
    refused = _without(differing, [*MAY_CHANGE, *job.settings.resume_override])
    if refused:
        names = ",".join(refused)
        raise StaleError(
            f"{job.origin.folder} belongs to a run with other settings: {'; '.join(differing[name] for name in refused)}. "
            f"Continue it in spite of that with --set train.resume_override=[{names}], or leave train.resume out "
            f"to train from step 0."
        )
    if job.origin.step > job.plan.steps:
        raise UsageError(
            f"{job.origin.folder} is at step {job.origin.step}, and this run has {job.plan.steps} steps. "
            f"Raise train.max_steps, or resume an older checkpoint."
        )
    if differing:
        changes = "; ".join(differing.values())
        context.say(f"Continuing {job.origin.folder} with other settings: {changes}")


def _without(names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The names that neither are allowed nor lie in a block that is."""
    blocks = tuple(allowed)
    return [
        name for name in names if not any(name == block or name.startswith(f"{block}.") for block in blocks)
    ]
