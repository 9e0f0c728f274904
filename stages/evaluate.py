"""Held-out metrics of any policy, a model folder or a hub name: the metrics that training logs.

In: a model, evaluation sets, reference log-probs and a loss.  Out: metrics of each set. Nothing is written, and the
reference model is not loaded. Run it with `align eval`.
"""

from collections.abc import Mapping
from pathlib import Path

from cache.artifacts import is_artifact, open_artifact
from cache.errors import DataError
from stages.data.rows import RowSet, distinct_ids
from stages.losses.contract import Loss
from stages.models.adapters import base_of, is_adapter, load_any
from stages.models.identity import check_base
from stages.models.loading import ModelSource, load_tokenizer
from stages.models.vocabulary import TokensInUse
from stages.runtime.context import Context, progress
from stages.runtime.distributed import World
from stages.runtime.limits import using_memory
from stages.train.checkpoints import STATE, Checkpoint
from stages.train.job import Job
from stages.train.preflight import check_rows
from stages.train.step.row_scorer import make_row_scorers
from stages.train.step.step import evaluate

HELDOUT = "heldout"


def saved_state(folder: Path, loss: Loss) -> dict[str, float]:
    """The state of the loss (bco: its mean reward) that training with the same loss has saved in a policy or checkpoint.

    Empty if there is none: for a loss without state, another loss or beta, or a model that align did not train.
    """
    if not loss.keeps_state:
        return {}
    if is_artifact(folder):
        manifest = open_artifact(folder).manifest
        identity, state = manifest["identity"], manifest["counts"].get("loss_state")
    elif (folder / STATE).is_file():
        saved = Checkpoint.read(folder).state
        identity, state = saved.identity or {}, saved.loss_state
    else:
        return {}
    return dict(state or {}) if identity.get("loss") == loss.model_dump() else {}


def evaluate_model(
    job: Job, model: ModelSource, state: dict[str, float], context: Context
) -> dict[str, dict[str, float]]:
    """Metrics of `model` on the job's held-out rows ('heldout') and on its evaluation sets, with the job's loss.

    `state` is the state of the loss, as `saved_state` returns it. Raises `DataError` if there are no rows to evaluate on.
    """
    sets = {HELDOUT: RowSet.of(job.rows, "heldout")}
    sets |= {name: RowSet.of(rows, "train") for name, rows in job.eval_sets.items()}
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    if not sets:
        raise DataError(
            f"{job.rows.path} has no held-out rows. Raise prepare.heldout_fraction, or name a file: "
            f"--set eval.sets.NAME=FILE."
        )
    TokensInUse(load_tokenizer(job.source), lambda: distinct_ids(sets.values())).check(
        model,
        "The model",
        f"Evaluate it on rows of its own: prepare them with --set policy.model={model.name}",
        context.log,
    )
    check_rows(job, sets.values(), base_of(model) if is_adapter(model.folder) else model, context)
    check_base(model)
    with using_memory(f"Lower compute.tokens_per_batch (now {job.compute.tokens_per_batch})."):
        return _metrics_of(job, model, sets, state, context)


def _metrics_of(
    job: Job, model: ModelSource, sets: Mapping[str, RowSet], state: dict[str, float], context: Context
) -> dict[str, dict[str, float]]:
    from stages.engine.scorer import Scorer  # imports transformers' modelling code

    scorer = Scorer(load_any(model, job.compute), job.compute, context.log)
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
