"""Stage 3 of 4: rows + cached reference log-probs + a loss -> a policy. The reference is never loaded.

Checks everything that can be checked without the model, runs the loop and publishes the policy. A run that
is typed again after a crash continues from its newest valid checkpoint. Run it with
`align train --loss kto`, or under `torchrun -m pipeline train`.
"""

from collections.abc import Callable

from cache.artifacts import Artifact, Draft
from cache.errors import UsageError
from cache.fingerprint import fingerprint
from stages.data.rows import RowSet
from stages.models.loading import check_length
from stages.runtime.context import Context
from stages.runtime.distributed import join_world
from stages.settings.fields import TrackSettings
from stages.train.audit import audit
from stages.train.checkpoints import Checkpoint, newest_checkpoint
from stages.train.data_requirements import check_needs
from stages.train.job import Job, find_policy
from stages.train.loop import Run
from stages.train.monitoring.dashboards import open_dashboards
from stages.train.monitoring.metrics_log import Tracker
from stages.train.preflight import check_feasible
from stages.train.publish import publish_policy
from stages.train.resume import check_origin, nearest_interrupted
from stages.train.schedules import make_schedule


def train(job: Job, track: TrackSettings, context: Context) -> Artifact:
    """Train the policy and return its artifact. Raises an `AlignError` before anything is loaded if it cannot."""
    train_rows = RowSet.of(job.rows, "train")
    eval_rows = {"": RowSet.of(job.rows, "heldout")}
    eval_rows |= {name: RowSet.of(rows, "train") for name, rows in job.eval_sets.items()}
    _check(job, train_rows, eval_rows, context)
    world = join_world(job.compute.device, job.settings.parallel == "fsdp")
    draft = context.store.draft("policy", job.name, "train", job.identity, keep=True)
    say = context.say if world.is_main else _silent
    checkpoint = world.from_main(lambda: _checkpoint_of(job, draft, context))
    run = Run(job, train_rows, eval_rows, checkpoint, draft.path, world, say)
    if checkpoint is None:
        _audit(run, eval_rows[""] if eval_rows[""].num_examples else train_rows, say)
    last_step = -1 if checkpoint is None else checkpoint.step
    tracker = Tracker(None)
    if world.is_main:
        boards = open_dashboards(track, draft.path, draft.final.name, job.identity, last_step)
        tracker = Tracker(draft.path, boards)
    try:
        run.go(tracker)
    finally:
        tracker.close()
    publish_policy(run, draft, context)
    world.barrier()
    artifact = find_policy(job, context)
    assert artifact is not None, "the policy was published under another name"
    return artifact


def _audit(run: Run, rows: RowSet, say: Callable[[str], None]) -> None:
    """Compare log-probs of real rows with those of the rows alone, and with the cached where these are the model's own."""
    job = run.job
    own = job.reference if job.reference and fingerprint(job.start) == job.reference.fingerprint else None
    packing, run.audit_difference = audit(run.policy.scorer, rows, own)
    say(f"Audit: rows scored in packs and alone agree within {packing:.2g} nats a token")
    if run.audit_difference is not None:
        say(
            f"Audit: the cached reference and the untouched policy agree within {run.audit_difference:.2g} nats a token"
        )


def _check(job: Job, rows: RowSet, eval_rows: dict[str, RowSet], context: Context) -> None:
    """Everything that can be wrong and shows before a model is loaded."""
    settings = job.settings
    check_needs(job.loss, job.rows, settings.pairs, context)
    for eval_set in job.eval_sets.values():
        check_needs(job.loss, eval_set, settings.pairs, context)
    if settings.save_best and settings.best_metric is None:
        raise UsageError(
            "train.save_best publishes the best evaluation by train.best_metric, which is not set. "
            "For example: --set train.best_metric=rewards/accuracies"
        )
    check_feasible(job)
    if job.origin is not None:
        check_origin(job, context)
    make_schedule(settings, job.plan.learning_rate, job.plan.steps)
    row_sets = [rows, *eval_rows.values()]
    if job.reference is not None:
        keys = [key for row_set in row_sets for key in row_set.scored_keys("kl" in job.loss.needs)]
        job.reference.require(keys, context.command("cache-ref"))
    check_length(job.source.folder, max(row_set.max_length() for row_set in row_sets))


def _checkpoint_of(job: Job, draft: Draft, context: Context) -> Checkpoint | None:
    """Where this run continues: its own newest valid checkpoint, or the one that `train.resume` names."""
    own = newest_checkpoint(draft.path, context.say)
    if job.origin is not None and (own is None or job.origin.step > own.step):
        return job.origin
    if own is None and (other := nearest_interrupted(job, context.store)) is not None:
        folder, step, fields = other
        context.say(
            f"An interrupted run at step {step} has other settings ({'; '.join(fields)}), so this one begins at step 0. "
            f"To continue that one: --set train.resume={folder}"
        )
    return own


def _silent(line: str) -> None:
    """Ranks other than the first say nothing."""
