"""Held-out metrics of any policy: those that training logs, for a model folder or a hub name.

In: a model, evaluation rows by name, the reference's log-probs and a loss.  Out: metrics by set. Nothing is
written, and the reference is not loaded. Run it with `align eval`.
"""

from pathlib import Path

from cache.artifacts import MANIFEST
from cache.errors import DataError
from cache.files import read_json
from stages.data.rows import RowSet
from stages.losses.contract import Loss
from stages.models.adapters import base_of, is_adapter, load_any
from stages.models.loading import ModelSource, check_length
from stages.runtime.context import Context, progress
from stages.runtime.distributed import World
from stages.train.checkpoints import STATE
from stages.train.job import Job
from stages.train.step.row_scorer import make_row_scorers
from stages.train.step.step import evaluate

HELDOUT = "heldout"


def saved_state(folder: Path, loss: Loss) -> dict[str, float]:
    """The running numbers (bco's mean reward) that training with this very loss left in a policy or checkpoint.

    Empty where there are none: another loss, another beta, or a model that was not trained here.
    """
    if not loss.keeps_state:
        return {}
    for name, place in ((MANIFEST, "counts"), (STATE, None)):
        if (folder / name).is_file():
            found = read_json(folder / name)
            holder = found if place is None else found[place]
            if found["identity"].get("loss") == loss.model_dump():
                return dict(holder.get("loss_state") or {})
    return {}


def evaluate_model(
    job: Job, model: ModelSource, state: dict[str, float], context: Context
) -> dict[str, dict[str, float]]:
    """Metrics of `model` on the job's held-out rows ('heldout') and evaluation sets, with the job's loss.

    `state` is what a loss that keeps any goes on from, as `saved_state` finds it. Raises `DataError` when there is
    nothing to evaluate on.
    """
    from stages.engine.scorer import Scorer  # brings transformers' modelling code

    sets = {HELDOUT: RowSet.of(job.rows, "heldout")}
    sets |= {name: RowSet.of(rows, "train") for name, rows in job.eval_sets.items()}
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    if not sets:
        raise DataError(
            f"{job.rows.path} has no held-out rows. Raise prepare.heldout_fraction, or name a file: "
            f"--set eval.sets.NAME=FILE."
        )
    folder = base_of(model.folder).folder if is_adapter(model.folder) else model.folder
    for rows in sets.values():
        check_length(folder, rows.max_length())
        if job.reference is not None:
            job.reference.require(rows.scored_keys("kl" in job.loss.needs), context.command("cache-ref"))
    scorer = Scorer(load_any(model, job.compute), job.compute, context.say)
    row_scorers = make_row_scorers(
        scorer,
        sets.values(),
        job.reference,
        job.loss,
        World(),
        job.settings.pairs,
        lambda: RowSet.of(job.rows, "train"),
    )
    found: dict[str, dict[str, float]] = {}
    with progress("eval", len(sets), "sets") as advance:
        for name, row_scorer in zip(sets, row_scorers, strict=True):
            number = row_scorer.rows.num_examples
            number = min(number, job.settings.eval_samples or number)
            found[name] = {"examples": number, **evaluate(row_scorer, job.loss, range(number), state)}
            advance(1, name)
    return found
