"""Held-out metrics of any policy: those that training logs, for a model folder or a hub name.

In: a model, evaluation rows by name, the reference's log-probs and a loss.  Out: metrics by set. Nothing is
written, and the reference is not loaded. Run it with `align eval`.
"""

from cache.errors import DataError
from stages.batches import RowScorer
from stages.context import Context, progress
from stages.density import DensityRatios
from stages.job import Job
from stages.models import ModelSource, check_length, load_model
from stages.parallel import World
from stages.rows import RowSet
from stages.steps import evaluate

HELDOUT = "heldout"


def evaluate_model(job: Job, model: ModelSource, context: Context) -> dict[str, dict[str, float]]:
    """Metrics of `model` on the job's held-out rows ('heldout') and evaluation sets, with the job's loss.

    A loss that keeps state from step to step (bco's running mean) begins with none. Raises `DataError` when
    there is nothing to evaluate on.
    """
    from stages.scoring import Scorer  # brings transformers' modelling code

    sets = {HELDOUT: RowSet.of(job.rows, "heldout")}
    sets |= {name: RowSet.of(rows, "train") for name, rows in job.eval_sets.items()}
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    if not sets:
        raise DataError(
            f"{job.rows.path} has no held-out rows. Raise prepare.heldout_fraction, or name a file: "
            f"--set eval.sets.NAME=FILE."
        )
    for rows in sets.values():
        check_length(model.folder, rows.max_length())
        if job.reference is not None:
            job.reference.require(rows.scored_keys(job.loss.needs_mismatched), context.command("cache-ref"))
    scorer = Scorer(load_model(model, job.compute), job.compute, context.say)
    ratios = DensityRatios(RowSet.of(job.rows, "train")) if job.loss.needs_density_ratios else None
    found: dict[str, dict[str, float]] = {}
    with progress("eval", len(sets), "sets") as advance:
        for name, rows in sets.items():
            own = ratios and ratios.of(rows)
            row_scorer = RowScorer(scorer, rows, job.reference, job.loss, World(), job.settings.pairs, own)
            number = min(rows.num_examples, job.settings.eval_samples or rows.num_examples)
            found[name] = {"examples": number, **evaluate(row_scorer, job.loss, range(number), {})}
            advance(1, name)
    return found
