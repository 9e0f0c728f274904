"""The judge that the block `judge` of a configuration names.

In: `Inputs`. Out: a `Judge`. Judges import what they need when they are opened.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cache.errors import UsageError
from stages.judge.contract import Judge
from stages.judge.function import FunctionJudge

if TYPE_CHECKING:
    from pipeline.inputs import Inputs

KINDS = ("function", "reward_model", "endpoint", "implicit", "answers")


def open_judge(inputs: "Inputs") -> Judge:
    """The one judge of the configuration; raises `UsageError` unless there is exactly one."""
    settings = inputs.config.judge
    named = [kind for kind in KINDS if getattr(settings, kind)]
    if len(named) != 1:
        what = f"names several judges, {' and '.join(named)}" if named else "names no judge"
        raise UsageError(
            f"The block judge {what}; expected one of {', '.join(KINDS)}, for example --set judge.function=rules:politeness."
        )
    return OPENERS[named[0]](inputs)


def _function(inputs: "Inputs") -> Judge:
    assert inputs.config.judge.function is not None
    return FunctionJudge.of(inputs.config.judge.function)


def _endpoint(inputs: "Inputs") -> Judge:
    from stages.judge.endpoint import EndpointJudge

    return EndpointJudge.of(inputs.config.judge)


OPENERS: dict[str, Callable[["Inputs"], Judge]] = {"function": _function, "endpoint": _endpoint}
