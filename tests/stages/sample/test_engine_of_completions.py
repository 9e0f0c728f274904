"""Completions are found by the engine that made them, whether it was named or chosen by `auto`."""

import torch

from stages.generation.contract import EngineName
from stages.generation.engines import auto_engine
from stages.generation.requests import Prompt
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.sample.job import SampleJob
from stages.sample.stage import find_completions
from stages.settings.fields import SampleSettings


def job(model, engine, **sample) -> SampleJob:
    settings = SampleSettings(engine=engine, **sample)
    compute = Compute(torch.device("cpu"), torch.float32, 2048)
    return SampleJob({"policy": ModelSource("tiny", model)}, [Prompt("0", "hi", [1])], settings, compute, ())


def publish(made: SampleJob, engine: EngineName, context, instead_of_vllm: str | None = None) -> None:
    draft = context.store.draft("completions", "tiny", "sample", made.identity("policy", engine))
    context.store.publish(draft, {"engine": engine, "instead_of_vllm": instead_of_vllm}, {}, "")


def test_what_auto_made_is_found_by_the_name_of_its_engine(tiny_model, context):
    publish(job(tiny_model, "auto"), "transformers", context, "vLLM stopped")
    assert find_completions(job(tiny_model, "auto"), context)
    assert find_completions(job(tiny_model, "transformers"), context)
    assert not find_completions(job(tiny_model, "vllm"), context)


def test_what_a_named_engine_made_is_found_by_auto_if_it_would_take_it(tiny_model, context):
    other = "vllm" if auto_engine() == "transformers" else "transformers"
    publish(job(tiny_model, other), other, context)
    assert not find_completions(job(tiny_model, "auto"), context)
    publish(job(tiny_model, auto_engine()), auto_engine(), context)
    assert find_completions(job(tiny_model, "auto"), context)


def test_greedy_sampling_has_no_top_p(tiny_model, context):
    publish(job(tiny_model, "transformers", temperature=0), "transformers", context)
    assert find_completions(job(tiny_model, "transformers", temperature=0, top_p=0.5, top_k=3), context)
    assert not find_completions(job(tiny_model, "transformers", temperature=1, top_p=0.5, top_k=3), context)
