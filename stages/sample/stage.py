"""Stage 4 of 4: models -> completions, in files that people and evaluation tools read.

Each model has an artifact of its own, `completions/<model>-<fingerprint>`, so that those of the reference are made once
for all policies of a sweep. It holds `completions.jsonl` (every completion) and the file of the evaluation tool that the
prompts belong to (`prompt_sets.py`). An interrupted run continues where it stopped. Run it with `align sample`.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from cache.artifacts import Artifact, Draft
from cache.files import disk_errors_named
from cache.ownership import claim
from stages.data.source_row import BadRow
from stages.generation.completion_files import FILE, CompletionRecord, write_jsonl
from stages.generation.contract import Engine, EngineError, EngineName
from stages.generation.engines import auto_engine, open_engine
from stages.generation.generate import as_completion, request_seed, requests_of
from stages.generation.requests import Model, Prompt, Request
from stages.runtime.context import Context, progress
from stages.runtime.limits import using_memory
from stages.sample.job import SampleJob
from stages.sample.journal import FILE as JOURNAL
from stages.sample.journal import Journal
from stages.sample.prompt_sets import conversation

KIND = "completions"


def find_completions(job: SampleJob, context: Context) -> dict[str, Artifact]:
    """The finished completions of this job by side, all made by one engine; empty if those of a side are missing.

    Under `auto` those of transformers count where vLLM did not run when they were made.
    """
    asked = job.settings.engine
    engines: tuple[EngineName, ...] = (auto_engine(), "transformers") if asked == "auto" else (asked,)
    for engine in dict.fromkeys(engines):
        found = {side: _find(job, side, engine, context) for side in job.models}
        if all(found.values()) and (
            engine == engines[0] or all(one.counts["instead_of_vllm"] for one in found.values() if one)
        ):
            return {side: one for side, one in found.items() if one}
    return {}


def sample(job: SampleJob, context: Context) -> dict[str, Artifact]:
    """Generate the completions that are missing and write them; returns those of every side.

    `auto` takes vLLM and falls back to transformers, for all models, so that compared completions come from one engine.
    """
    return sample_all([job], context)[0]


def sample_all(jobs: Sequence[SampleJob], context: Context) -> list[dict[str, Artifact]]:
    """As `sample`, for jobs with the same `sample.engine`, which one engine does."""
    for problems in (job.left_out for job in jobs):
        for problem in problems[:3]:
            context.log(f"Left out: {problem}")
        if len(problems) > 3:
            context.log(f"Left out {len(problems):,} prompts in all, listed in the manifest.")
    asked = jobs[0].settings.engine
    if asked != "auto":
        return _sample_all(jobs, asked, context, None)
    try:
        return _sample_all(jobs, "vllm", context, None)
    except EngineError as error:
        context.log(f"Sampling with transformers, which is slower: {error}")
        return _sample_all(jobs, "transformers", context, str(error))


def _find(job: SampleJob, side: str, engine: EngineName, context: Context) -> Artifact | None:
    return context.store.find(KIND, job.models[side].short_name, job.identity(side, engine))


def _sample_all(
    jobs: Sequence[SampleJob], name: EngineName, context: Context, instead_of_vllm: str | None
) -> list[dict[str, Artifact]]:
    done = []
    with ExitStack() as stack:
        engine: Engine | None = None  # opened for the first completions that are missing
        for job in jobs:
            made = {}
            for side in job.models:
                artifact = _find(job, side, name, context)
                if artifact is None:
                    engine = engine or stack.enter_context(open_engine(name))
                    artifact = _sample_model(job, side, engine, context, instead_of_vllm)
                made[side] = artifact
            done.append(made)
    return done


def _sample_model(
    job: SampleJob, side: str, engine: Engine, context: Context, instead_of_vllm: str | None
) -> Artifact:
    """Sample one model and publish its completions."""
    model = job.models[side]
    identity = job.identity(side, engine.name)
    draft = context.store.draft(KIND, model.short_name, "sample", identity, keep=True)
    with disk_errors_named(draft.path):
        draft.claim = claim(draft.path, context.log)
    try:
        context.log(f"Sampling {len(job.prompts):,} prompts from {model.name} with {engine.name}")
        opened = job.open(model)
        advice = f"Lower sample.max_tokens (now {job.settings.max_tokens}) or shorten the prompts."
        with using_memory(advice), Journal(draft.path) as journal:
            records = _complete(job, side, opened, engine, journal)
        return _publish(job, side, records, draft, context, engine.name, instead_of_vllm)
    finally:
        draft.release()


def _complete(
    job: SampleJob, side: str, model: Model, engine: Engine, journal: Journal
) -> list[CompletionRecord]:
    """The completions of all turns, in prompt order, then sample order, then turn order."""
    name = job.models[side].short_name
    total = sum(1 + len(prompt.next_turns) for prompt in job.prompts) * job.settings.num_samples
    records: dict[tuple[int, int], list[CompletionRecord]] = {}
    first = {(one.prompt_index, one.sample_index): one for one in requests_of(job.prompts, job.sampling)}
    with progress(f"sample {name}", total, "completions", done=len(journal.finished)) as advance:
        began, tokens = time.monotonic(), 0
        for turn in range(1, job.num_turns + 1):
            requests = first if turn == 1 else _next_turn(job, records, model, turn)
            todo = [one for place, one in requests.items() if (turn, *place) not in journal.finished]
            for place, ids in engine.complete(model, todo, job.sampling, job.options):
                journal.add((turn, todo[place].prompt_index, todo[place].sample_index), ids)
                tokens += len(ids)
                advance(1, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
            for place, request in requests.items():
                ids = journal.finished[(turn, *place)]
                record = _record(job.prompts[place[0]], model, request, turn, ids, name)
                if turn > 1:
                    record = replace(record, prompt=_conversation(job.prompts[place[0]], records[place]))
                records.setdefault(place, []).append(record)
    return [record for place in sorted(records) for record in _with_all_turns(records[place], job, place[0])]


def _next_turn(
    job: SampleJob, records: dict[tuple[int, int], list[CompletionRecord]], model: Model, turn: int
) -> dict[tuple[int, int], Request]:
    """The requests of a later turn, each conditioned on the answers before; those that can be asked."""
    requests = {}
    for (index, sample), own in records.items():
        prompt = job.prompts[index]
        if len(own) != turn - 1 or len(prompt.next_turns) < turn - 1:
            continue
        try:
            ids = job.encode(_conversation(prompt, own))
        except BadRow:  # the answer spells a special token
            continue
        if len(ids) < model.max_length:
            seed = request_seed(job.settings.seed, f"{prompt.id} turn {turn}", sample)
            temperature = job.settings.temperature if prompt.temperature is None else prompt.temperature
            requests[index, sample] = Request(index, sample, seed, ids, temperature)
    return requests


def _conversation(prompt: Prompt, own: list[CompletionRecord]) -> list:
    answers = [record.completion for record in own]
    return conversation(prompt.content, list(zip(answers, prompt.next_turns, strict=False)))


def _with_all_turns(own: list[CompletionRecord], job: SampleJob, index: int) -> list[CompletionRecord]:
    """The answers of one sample, with empty ones for the turns that could not be asked."""
    prompt = job.prompts[index]
    while len(own) < 1 + len(prompt.next_turns):
        asked = _conversation(prompt, own)
        own.append(
            replace(
                own[0],
                prompt=asked,
                turn=len(own) + 1,
                completion="",
                num_tokens=0,
                token_ids=[],
                finish_reason="not_asked",
            )
        )
    return own


def _record(
    prompt: Prompt, model: Model, request: Request, turn: int, ids: list[int], name: str
) -> CompletionRecord:
    completion = as_completion(model, request, ids)
    return CompletionRecord(
        id=prompt.id,
        prompt=prompt.content,
        completion=completion.text,
        turn=turn,
        sample_index=completion.sample_index,
        seed=completion.seed,
        finish_reason=completion.finish_reason,
        num_tokens=len(ids),
        model=name,
        keys=prompt.keys,
        token_ids=ids,
    )


def _publish(
    job: SampleJob,
    side: str,
    records: list[CompletionRecord],
    draft: Draft,
    context: Context,
    engine: EngineName,
    instead_of_vllm: str | None,
) -> Artifact:
    write_jsonl(records, draft.path / FILE)
    job.set.write(records, draft.path)
    (draft.path / JOURNAL).unlink()
    counts = {
        "engine": engine,
        "instead_of_vllm": instead_of_vllm,
        "model": job.models[side].short_name,
        "prompt_set": job.set.name,
        "num_prompts": len(job.prompts),
        "left_out": list(job.left_out),
        "num_completions": len(records),
        "finished": sum(record.finish_reason == "stop" for record in records),
        "not_asked": sum(record.finish_reason == "not_asked" for record in records),
    }
    return context.store.publish(draft, counts, {side: job.models[side].name}, context.config_text)
