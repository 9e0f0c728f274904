"""Stage 3 of 4: rows, cached reference log-probs and a loss -> a policy. The reference model is never loaded.

Checks all that can be checked without the model, runs the training loop, publishes the policy. After a crash the same
command continues from the newest valid checkpoint. Run it with `align train --loss kto`, or under
`torchrun -m pipeline train`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cache.artifacts import Artifact, Draft
from cache.files import disk_errors_named
from cache.fingerprint import fingerprint
from cache.ownership import Claim, claim
from stages.data.rows import RowSet
from stages.runtime.context import Context
from stages.runtime.distributed import World, join_world
from stages.runtime.limits import using_memory, writing
from stages.settings.fields import TrackSettings
from stages.train.audit import Audit, audit
from stages.train.checkpoints import Checkpoint, newest_checkpoint
from stages.train.job import Job, find_policy
from stages.train.loop import Run
from stages.train.monitoring.dashboards import open_dashboards
from stages.train.monitoring.metrics_log import Tracker
from stages.train.preflight import preflight
from stages.train.publish import publish_policy, remove_leftovers
from stages.train.resume import nearest_interrupted

_ADVICE = (
    "Lower compute.tokens_per_batch (now {}), set train.gradient_checkpointing=true or train an adapter; `align plan` "
    "predicts the memory of each. The same command continues from the last checkpoint."
)


def train(job: Job, track: TrackSettings, context: Context) -> Artifact:
    """Train the policy and return its artifact. Raises an `AlignError` before a model is loaded if the run cannot work."""
    train_rows = RowSet.of(job.rows, "train")
    eval_rows = {"": RowSet.of(job.rows, "heldout")}
    eval_rows |= {name: RowSet.of(rows, "train") for name, rows in job.eval_sets.items()}
    preflight(job, train_rows, eval_rows, context)
    world = join_world(job.compute.device, job.settings.parallel == "fsdp")
    draft = context.store.draft("policy", job.name, "train", job.identity, keep=True)
    with (
        _sole_run(draft.path, world, context.log),
        using_memory(_ADVICE.format(job.compute.tokens_per_batch)),
    ):
        finished = world.from_main(lambda: find_policy(job, context))
        if finished is None:  # else another run has published it since this one began to look
            _train(job, train_rows, eval_rows, draft, world, track, context)
        elif world.is_main:
            remove_leftovers(finished)
    artifact = find_policy(job, context)
    assert artifact is not None, "the policy was published under another name"
    return artifact


@contextmanager
def _sole_run(working: Path, world: World, log: Callable[[str], None]) -> Iterator[None]:
    """Within the context no other run writes into this working folder; raises `BusyError` if one does already."""
    held: list[Claim] = []

    def take() -> None:
        with disk_errors_named(working):
            held.append(claim(working, log))

    world.from_main(take)
    try:
        yield
    finally:
        for own in held:
            own.release()


def _train(
    job: Job,
    train_rows: RowSet,
    eval_rows: Mapping[str, RowSet],
    draft: Draft,
    world: World,
    track: TrackSettings,
    context: Context,
) -> None:
    """Run the training loop from step 0 or a checkpoint, and publish the policy. Every rank calls this."""
    log = context.log if world.is_main else _silent
    checkpoint = world.from_main(lambda: _checkpoint_of(job, draft, context))
    run = Run(job, train_rows, eval_rows, checkpoint, draft.path, world, log)
    difference = _audit(run, job).reference if checkpoint is None else None
    last_step = -1 if checkpoint is None else checkpoint.step
    tracker = Tracker(None)
    if world.is_main:
        with writing(draft.path):
            boards = open_dashboards(
                track, draft.path, job.settings.name or draft.final.name, job.identity, last_step
            )
        tracker = Tracker(draft.path, boards)
    try:
        run.go(tracker, difference)
    finally:
        tracker.close()
    publish_policy(run, draft, context)
    world.barrier()


def _audit(run: Run, job: Job) -> Audit:
    """Compare log-probs of real rows with those of the rows alone, and with the cached if the reference is the same model."""
    reference = job.reference
    own = reference if reference is not None and fingerprint(job.start) == reference.fingerprint else None
    heldout = run.eval_scorers.get("")
    found = audit(run.policy.scorer, run.rows if heldout is None else heldout.rows, own)
    run.log(f"Audit: rows scored in packs and alone agree within {found.packing:.2g} nats per token")
    if found.reference is not None:
        run.log(
            f"Audit: the cached reference and the untrained policy agree within {found.reference:.2g} nats per token"
        )
    return found


def _checkpoint_of(job: Job, draft: Draft, context: Context) -> Checkpoint | None:
    """The checkpoint to continue from: the run's own newest valid one, or the one that `train.resume` names."""
    own = newest_checkpoint(draft.path, context.log, job.own_identity)
    if job.origin is not None and (own is None or job.origin.step > own.step):
        return job.origin
    if own is None and (other := nearest_interrupted(job, context.store)) is not None:
        context.log(
            f"An interrupted run at step {other.step} has other settings ({'; '.join(other.differing)}), so this one "
            f"begins at step 0. Continue that run with: --set train.resume={other.checkpoint}"
        )
    return own


def _silent(line: str) -> None:
    """The `log` of all ranks but the first."""
