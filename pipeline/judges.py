"""The judge that a configuration names, and the completions that it judges.

In: `Inputs`. Out: a `Judge`, and pairs of the model in question and its baseline. Judges import what they need when they are
opened.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import StaleError, UsageError
from stages.compare.completions import Completed, Paired, completions_of, paired
from stages.judge.contract import Judge
from stages.judge.stage import Asking, JudgeJob
from stages.settings.judge import KINDS

if TYPE_CHECKING:
    from pipeline.inputs import Inputs


def judge_kind(inputs: "Inputs") -> str | None:
    """The kind of judge that the block `judge` names, if any; raises `UsageError` if it names several."""
    named = [kind for kind in KINDS if getattr(inputs.config.judge, kind)]
    if len(named) > 1:
        raise UsageError(f"The block judge names {' and '.join(named)}; expected one of them.")
    return named[0] if named else None


def open_judge(inputs: "Inputs") -> Judge:
    """The judge of the configuration; raises `UsageError` if it names none."""
    kind = judge_kind(inputs)
    if kind is None:
        raise UsageError(
            f"The block judge names no judge; expected one of {', '.join(KINDS)}, for example --set judge.function=rules:politeness."
        )
    return OPENERS[kind](inputs)


def _function(inputs: "Inputs") -> Judge:
    from stages.judge.function import FunctionJudge

    return FunctionJudge.of(inputs.config.judge.function or "")


def _endpoint(inputs: "Inputs") -> Judge:
    from stages.judge.endpoint import EndpointJudge

    return EndpointJudge.of(inputs.config.judge)


def _reward_model(inputs: "Inputs") -> Judge:
    from stages.judge.reward_model import RewardModelJudge

    source = inputs.model(inputs.config.judge.reward_model or "", None)
    return RewardModelJudge.of(source, inputs.compute, inputs.context.log)


def _answers(inputs: "Inputs") -> Judge:
    from stages.judge.answers import AnswersJudge

    return AnswersJudge.of(inputs.config.judge)


def _implicit(inputs: "Inputs") -> Judge:
    from stages.judge.implicit import ImplicitJudge

    settings = inputs.config.judge
    name = settings.implicit_model
    policy = inputs.policy if name is None else inputs.model(name, None, or_adapter=True)
    reference = inputs.model(*inputs.config.reference_model)
    return ImplicitJudge(
        policy, reference, settings.beta, inputs.template, inputs.compute, inputs.context.log
    )


OPENERS: dict[str, Callable[["Inputs"], Judge]] = {
    "function": _function,
    "reward_model": _reward_model,
    "endpoint": _endpoint,
    "implicit": _implicit,
    "answers": _answers,
}


def judge_job(inputs: "Inputs", judge: Judge, found: Paired) -> JudgeJob:
    """The pairs, and how the configuration asks about them; what has no partner is said."""
    for number, whose in (
        (found.alone, "completions"),
        (found.baseline_alone, "completions of the baseline"),
    ):
        if number:
            inputs.context.log(f"judge: left out {number:,} {whose} without a partner")
    settings = inputs.config.judge
    return JudgeJob(
        judge,
        found.pairs,
        Asking(settings.both_orders, settings.prompt_price, settings.completion_price),
    )


def run_pairs(inputs: "Inputs") -> Paired:
    """The pairs of this configuration's model and `judge.baseline`, or the reference."""
    return paired(*completions_of_run(inputs))


def completions_of_run(inputs: "Inputs") -> tuple[list[Completed], list[Completed]]:
    """The completions of this configuration's model, and those of `judge.baseline` or the reference."""
    from stages.sample.stage import find_completions

    baseline = inputs.config.judge.baseline
    job = inputs.sample_job_with_reference if baseline is None else inputs.sample_job
    found = find_completions(job, inputs.context)
    if not found:
        asked = "--set sample.compare=true" if baseline is None and not inputs.config.sample.compare else ""
        raise StaleError(
            f"The completions of {' and '.join(job.models)} are not in {inputs.context.store.root}. Make them with: {inputs.context.command('sample', asked)}"
        )
    other = found["reference"].path if baseline is None else Path(baseline).expanduser()
    own = next(artifact for side, artifact in found.items() if side != "reference")
    return completions_of(own.path), completions_of(other)
