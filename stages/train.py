"""Stage 3 of 4: rows + cached reference log-probs + a loss -> a policy. The reference is never loaded.

Checks everything that can be checked without the model, runs the loop and publishes the policy. A run that
is typed again after a crash continues from its newest valid checkpoint. Run it with
`align train --loss kto`, or under `torchrun -m pipeline train`.
"""

from cache.artifacts import Artifact
from cache.fingerprint import fingerprint
from stages.audit import audit
from stages.context import Context
from stages.feasible import check_feasible
from stages.job import Job, find_policy
from stages.loop import METRICS, Run
from stages.models import check_length
from stages.needs import check_needs
from stages.parallel import join_world
from stages.policy import publish_policy
from stages.rows import RowSet
from stages.settings import TrackSettings
from stages.tracking import Tracker


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
    check_feasible(job)
    world = join_world(compute.device, job.settings.parallel == "fsdp")
    draft = context.store.draft("policy", job.name, "train", job.identity, keep=True)
    say = context.say if world.is_main else _silent
    run = Run(job, train_rows, heldout, world, draft, say)
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
    publish_policy(run, source, context)
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


def _silent(line: str) -> None:
    """Ranks other than the first say nothing."""
