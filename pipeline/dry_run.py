"""What a stage would do, from what is in the store: `--dry-run`. Writes nothing and computes nothing."""

from collections.abc import Sequence
from typing import Any

from cache.errors import StaleError
from pipeline.inputs import Inputs
from stages.cache_ref.stage import count_missing
from stages.merge import find_merged
from stages.prepare.stage import find_rows
from stages.sample.stage import find_completions
from stages.train.job import find_policy
from stages.train.preflight import check_data

Result = dict[str, Any]


def plan_stages(inputs: Inputs, stages: Sequence[str]) -> Result:
    """For each stage what it would do, or after what it would run."""
    if inputs.needs_quickstart:
        return {name: {"would": "build the quickstart's model and data first"} for name in stages}
    plans: Result = {}
    for name in stages:
        try:
            plans[name] = _PLANS[name](inputs)
        except StaleError as error:
            plans[name] = {"would": f"run after its inputs are there: {error}"}
    return plans


def _plan_prepare(inputs: Inputs) -> Result:
    found = find_rows(
        inputs.data, inputs.config.prepare, inputs.template, inputs.context, inputs.config.filter
    )
    missing = [
        name
        for name, data in inputs.config.eval.sets.items()
        if find_rows(data, inputs.eval_prepare, inputs.template, inputs.context) is None
    ]
    return {
        "would": "reuse" if found and not missing else "read and tokenize",
        "source": inputs.data_name,
        **({"artifact": str(found.path)} if found else {}),
        **({"eval_sets": ", ".join(missing)} if missing else {}),
    }


def _plan_cache_ref(inputs: Inputs) -> Result:
    source = inputs.model(*inputs.config.reference_model)
    row_sets = [inputs.rows, *inputs.eval_sets.values()]
    needed, missing, tokens = count_missing(row_sets, source, inputs.compute, inputs.context)
    return {
        "would": "score" if missing else "reuse",
        "rows_needed": needed,
        "rows_missing": missing,
        "tokens": tokens,
    }


def _plan_train(inputs: Inputs) -> Result:
    job = inputs.job
    check_data(job.loss, job.rows, job.settings.pairs, inputs.context)
    plan = job.plan
    return {
        "would": "reuse" if find_policy(job, inputs.context) else "train",
        "loss": inputs.loss_name,
        "examples": job.rows.counts["examples"]["train"],
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
    }


def _plan_eval(inputs: Inputs) -> Result:
    return {"would": "evaluate", "model": inputs.evaluated.name, "loss": inputs.loss_name}


def _plan_sample(inputs: Inputs) -> Result:
    job = inputs.sample_job
    return {
        "would": "reuse" if find_completions(job, inputs.context) else "generate",
        "num_prompts": len(job.prompts),
        "models": [model.name for model in job.models.values()],
    }


def _plan_merge(inputs: Inputs) -> Result:
    return {
        "would": "reuse" if find_merged(inputs.policy_artifact, inputs.context) else "merge",
        "policy": str(inputs.policy_artifact.path),
    }


_PLANS = {
    "prepare": _plan_prepare,
    "cache-ref": _plan_cache_ref,
    "train": _plan_train,
    "eval": _plan_eval,
    "sample": _plan_sample,
    "merge": _plan_merge,
}
