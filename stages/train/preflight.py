"""Refuses a training run that cannot work, before a model is loaded.

In: a job and its rows.  Out: nothing, or an `AlignError` that says what to change.
"""

from collections.abc import Iterable, Mapping

from cache.artifacts import Artifact
from cache.errors import DataError, MachineError, StaleError, UsageError
from cache.row_keys import RowKeys
from stages.data.rows import RowSet
from stages.losses import LOSSES
from stages.losses.contract import Loss
from stages.models.adapters import check_adapter
from stages.models.fit import check_can_be_saved, check_rows_fit
from stages.models.loading import ModelSource
from stages.runtime.compute import require_bitsandbytes
from stages.runtime.context import Context
from stages.settings.train import PairStrategy
from stages.train.job import Job
from stages.train.optimizers import NEEDS_BITSANDBYTES, NOT_SHARDED
from stages.train.resume import differing_settings
from stages.train.schedules import make_schedule

# Settings that may differ from the run that is continued: they do not change the result of a step.
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
    """Check data, settings, the checkpoint to continue, the reference log-probs and lengths; raise an `AlignError`."""
    settings = job.settings
    for artifact in (job.rows, *job.eval_sets.values()):
        check_data(job.loss, artifact, settings.pairs, context)
    if settings.save_best and settings.best_metric is None:
        raise UsageError(
            "train.save_best publishes the weights of the best evaluation by train.best_metric, which is not set. "
            "Set it, for example: --set train.best_metric=rewards/accuracies"
        )
    check_settings(job)
    if job.origin is not None:
        _check_origin(job, context)
    if job.beginning is not None:
        _check_beginning(job)
    make_schedule(settings, job.resolved.learning_rate, job.resolved.steps)
    check_rows(job, [rows, *eval_rows.values()], job.source, context)


def check_rows(job: Job, row_sets: Iterable[RowSet], model: ModelSource, context: Context) -> None:
    """Raise `StaleError` if reference log-probs of a row are missing, `UsageError` if a row does not fit the model."""
    row_sets = list(row_sets)
    if job.reference is not None:
        keys = RowKeys.joined(row_set.scored_keys("kl" in job.loss.needs) for row_set in row_sets)
        job.reference.require(keys, context.command("cache-ref"))
    check_rows_fit(model, row_sets)


def check_settings(job: Job) -> None:
    """Raise `UsageError` for settings that contradict each other, `MachineError` for those that need another machine."""
    settings, compute = job.settings, job.compute
    sharded = settings.parallel == "fsdp"
    if compute.load_in_4bit and job.adapter.name == "none":
        raise UsageError(
            "compute.load_in_4bit freezes the model's own weights, so nothing is left to train. "
            "Train an adapter with --set adapter.name=lora, or do not load in 4 bits."
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
            "train.optimizer=paged_adamw_8bit needs a GPU, and compute.device is not cuda. Use adamw_8bit."
        )
    if settings.activation_offload and compute.device.type != "cuda":
        raise MachineError(
            f"train.activation_offload moves activations from a GPU to the host, and compute.device is {compute.device.type}. "
            f"Leave it out."
        )
    check_adapter(job.adapter, job.source)
    if job.adapter.name == "none":
        check_can_be_saved(job.source)


def check_data(loss: Loss, rows: Artifact, pairs: PairStrategy, context: Context) -> None:
    """Raise an `AlignError` if the prepared rows lack something that the loss needs."""
    roles = rows.counts["rows_by_role"]
    name = loss.model_dump()["name"]
    if loss.unit != "row" and not roles.get("chosen") and not roles.get("ranked"):
        others = [other for other, cls in LOSSES.items() if cls.unit == "row"]
        raise UsageError(
            f"Loss {name} needs pairs of a chosen and a rejected completion, and {rows.path} has none. "
            f"Losses for unpaired data: {', '.join(others)}."
        )
    if "kl" in loss.needs and not roles.get("mismatched"):
        if rows.manifest["identity"]["prepare"]["mismatched"]:
            others = [other for other, cls in LOSSES.items() if cls.unit == "row" and "kl" not in cls().needs]
            raise UsageError(
                f"Loss {name} needs mismatched rows, each a prompt with the completion of another prompt, and the neighbours in "
                f"{rows.path} all have the same prompt. Add data with other prompts, or use {' or '.join(others)}."
            )
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
            f"Loss {name} needs a score for each completion, and {unscored} completions in {rows.path} have none. "
            f"Use data with the columns score_chosen and score_rejected, or graded responses."
        )
    if rows.counts["weighted_rows"] and "weights" not in loss.needs:
        others = [other for other, cls in LOSSES.items() if "weights" in cls.always_needs]
        raise UsageError(
            f"Loss {name} ignores weights, and {rows.counts['weighted_rows']:,} rows in {rows.path} have a weight other than 1. "
            f"Losses with weights: {', '.join(others)}. Or prepare the data without weights (data.ties=drop; no weight columns)."
        )
    if "density_ratios" in loss.needs and (roles.get("chosen") or roles.get("ranked")):
        raise UsageError(
            f"Loss {name} with udm compares the prompts of desirable and undesirable completions, and in the pairs of "
            f"{rows.path} both have the same prompts. Leave udm out, or use unpaired data."
        )
    if loss.unit == "list" and roles.get("ranked") and pairs != "all":
        raise UsageError(
            f"Loss {name} compares all completions of a prompt, and train.pairs={pairs} leaves out some of those in the "
            f"ranked lists of {rows.path}. Use --set train.pairs=all."
        )
    if pairs != "best_worst":
        _check_pairs(loss, name, rows, pairs)


def _check_pairs(loss: Loss, name: str, rows: Artifact, pairs: PairStrategy) -> None:
    """Refuse a strategy other than best_worst without ranked lists, or for a loss that a row in many pairs breaks."""
    if not rows.counts["rows_by_role"].get("ranked"):
        raise UsageError(
            f"train.pairs={pairs} forms pairs from ranked lists, and {rows.path} has no ranked lists. "
            f"Use --set train.pairs=best_worst, or keep the lists of graded data with --set prepare.graded=ranked."
        )
    if "desirable" in loss.needs:
        raise UsageError(
            f"Loss {name} needs each completion to be desirable or undesirable, and train.pairs={pairs} puts completions of "
            f"a ranked list on both sides. Use --set train.pairs=best_worst."
        )
    if "shared_logps" in loss.needs:
        raise UsageError(
            f"Loss {name} with ld_alpha compares a completion with exactly one other, and train.pairs={pairs} compares it "
            f"with several. Use --set train.pairs=best_worst, or leave ld_alpha out."
        )


def _check_origin(job: Job, context: Context) -> None:
    """Raise `StaleError` for fields that differ from the run to continue and may not, `UsageError` if it is too far."""
    assert job.origin is not None, "a run without train.resume has no origin"
    assert job.origin.state.identity is not None, "open_origin refuses checkpoints without one"
    differing = differing_settings(job.origin.state.identity, job.own_identity)
    lengths = [job.settings.max_steps, job.origin.state.identity["train"].get("max_steps")]
    # Where train.max_steps ends one of the runs, its number of epochs has no effect.
    free = [*MAY_CHANGE, *(["train.num_epochs"] if any(lengths) else [])]
    refused = _without(differing, [*free, *job.settings.resume_override])
    if refused:
        names = ",".join(refused)
        raise StaleError(
            f"{job.origin.folder} belongs to a run with other settings: {'; '.join(differing[name] for name in refused)}. "
            f"Continue it nevertheless with --set train.resume_override=[{names}], or leave train.resume out "
            f"to train from step 0."
        )
    if job.origin.step > job.resolved.steps:
        raise UsageError(
            f"{job.origin.folder} is at step {job.origin.step}, and this run has {job.resolved.steps} steps. "
            f"Raise train.max_steps, or resume an older checkpoint."
        )
    if differing:
        changes = "; ".join(differing.values())
        context.log(f"Continuing {job.origin.folder} with other settings: {changes}")


def _check_beginning(job: Job) -> None:
    """Raise `StaleError` for a checkpoint of another model, adapter or optimizer, whose state does not fit."""
    assert job.beginning is not None, "a run without train.begin_from has no other beginning"
    differing = differing_settings(job.beginning.state.identity or {}, job.own_identity)
    parts = ("start", "adapter", "train.optimizer")
    refused = [
        line for name, line in differing.items() if any(f"{name}.".startswith(f"{part}.") for part in parts)
    ]
    if refused:
        raise StaleError(
            f"train.begin_from={job.beginning.folder} is a checkpoint of another model or optimizer: {'; '.join(refused)}. "
            f"Name one of the same policy.model, adapter and train.optimizer."
        )


def _without(names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The names that are neither allowed nor in an allowed block."""
    blocks = tuple(allowed)
    return [
        name for name in names if not any(name == block or name.startswith(f"{block}.") for block in blocks)
    ]
