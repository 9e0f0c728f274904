"""Completions are found by the engine that made them, whether it was named or chosen by `auto`."""

import torch

from stages.generation.generate import auto_engine
from stages.generation.requests import Prompt
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.sample.stage import SampleJob, find_completions
from stages.settings.fields import SampleSettings


def job(model, engine, **sample) -> SampleJob:
    settings = SampleSettings(engine=engine, **sample)
    compute = Compute(torch.device("cpu"), torch.float32, 2048)
    return SampleJob({"policy": ModelSource("tiny", model)}, [Prompt("0", "hi", [1])], settings, compute, ())


def publish(made: SampleJob, engine: str, context) -> None:
    draft = context.store.draft("completions", made.name, "sample", made.identity)
    context.store.publish(draft, {"engine": engine}, {}, "")


def test_what_auto_made_is_found_by_the_name_of_its_engine(tiny_model, context):
    publish(job(tiny_model, "auto"), "transformers", context)
    assert find_completions(job(tiny_model, "auto"), context) is not None
    assert find_completions(job(tiny_model, "transformers"), context) is not None
    assert find_completions(job(tiny_model, "vllm"), context) is None


def test_what_a_named_engine_made_is_found_by_auto_if_it_would_take_it(tiny_model, context):
    other = "vllm" if auto_engine() == "transformers" else "transformers"
    publish(job(tiny_model, other), other, context)
    assert find_completions(job(tiny_model, "auto"), context) is None
    publish(job(tiny_model, auto_engine()), auto_engine(), context)
    assert find_completions(job(tiny_model, "auto"), context) is not None


def test_greedy_sampling_has_no_top_p(tiny_model, context):
    publish(job(tiny_model, "transformers", temperature=0), "transformers", context)
    assert find_completions(job(tiny_model, "transformers", temperature=0, top_p=0.5, top_k=3), context)
    assert (
        find_completions(job(tiny_model, "transformers", temperature=1, top_p=0.5, top_k=3), context) is None
    )
