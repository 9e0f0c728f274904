"""Stage 4 of 4: a policy -> completions, in files that people and evaluation tools read.

Prompts are those of the held-out rows, with the token ids of the evaluation, or come from a file, rendered with the
same template. Writes `completions/<model>-<fingerprint>` with `completions.jsonl`
(every completion) and for each model an `alpaca_eval-<side>.json`. Run it with `align sample`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cache.artifacts import Artifact
from cache.errors import DataError
from cache.fingerprint import canonical_json
from stages.generation.completion_files import CompletionRecord, write_alpaca_eval, write_jsonl
from stages.generation.generate import Completion, Engine, auto_engine, generate, open_model
from stages.generation.requests import EngineOptions, Prompt, Sampling
from stages.models.adapters import base_of, is_adapter
from stages.models.fit import num_positions
from stages.models.identity import model_identity
from stages.models.loading import ModelSource
from stages.models.vocabulary import TokensInUse, tokenizer_sha256
from stages.runtime.compute import Compute
from stages.runtime.context import Context
from stages.runtime.limits import using_memory
from stages.sample.prompts import file_prompts, heldout_prompts
from stages.settings.fields import SampleSettings
from stages.tokenization.template import Template

STAGE_VERSION = 1


@dataclass(frozen=True)
class SampleJob:
    """What is sampled and how: models by side (policy, reference, or model for a named one), prompts, settings.

    `too_long` has the ids of prompts that are left out, because one of the models has too few positions for them,
    `unusable` what is wrong with rows of the file that have no prompt.
    """

    models: Mapping[str, ModelSource]
    prompts: list[Prompt]
    settings: SampleSettings
    compute: Compute
    stop_token_ids: tuple[int, ...]
    too_long: tuple[str, ...] = ()
    unusable: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        models: Mapping[str, ModelSource],
        rows: Artifact,
        template: Template,
        settings: SampleSettings,
        compute: Compute,
    ) -> "SampleJob":
        """Collect the prompts; raises `DataError` when there are none."""
        prompts, unusable = (
            (heldout_prompts(rows, template), [])
            if settings.prompts is None
            else file_prompts(settings.prompts, template)
        )
        chosen = prompts[: settings.num_prompts]
        if not chosen:
            raise DataError(
                f"{rows.path} has no held-out prompts. Give a file with --set sample.prompts=FILE, or raise prepare.heldout_fraction."
            )
        most = min(filter(None, map(_positions, models.values())), default=None)
        too_long = tuple(prompt.id for prompt in chosen if most is not None and len(prompt.ids) >= most)
        fitting = [prompt for prompt in chosen if most is None or len(prompt.ids) < most]
        if not fitting:
            raise DataError(
                f"All {len(chosen)} prompts have {most} tokens or more, and {' and '.join(m.name for m in models.values())} has {most} positions. Give shorter ones with --set sample.prompts=FILE."
            )
        return cls(
            models, fitting, settings, compute, tuple(rows.counts["turn_end_ids"]), too_long, tuple(unusable)
        )

    @property
    def name(self) -> str:
        """Readable part of the artifact's folder name, from the first model."""
        return next(iter(self.models.values())).short_name

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters."""
        settings = self.settings
        return Sampling(
            settings.temperature,
            settings.top_p,
            settings.top_k,
            settings.max_tokens,
            settings.seed,
            settings.num_samples,
            self.stop_token_ids,
        )

    @property
    def options(self) -> EngineOptions:
        """How the engine runs."""
        longest = max(len(prompt.ids) for prompt in self.prompts)
        return EngineOptions(
            self.compute.dtype_name,
            max_model_length=longest + self.settings.max_tokens,
            trust_remote_code=any(model.runs_code for model in self.models.values()),
        )

    def check_tokens(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        """Raise `UsageError` if the prompts, which `tokenizer` made, are other tokens to a model."""
        used = TokensInUse(
            tokenizer, lambda: sorted({token for prompt in self.prompts for token in prompt.ids})
        )
        for model in self.models.values():
            remedy = f"Sample it with prompts of its own: prepare them with --set policy.model={model.name}"
            used.check(model, "The model", remedy, say)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that changes the completions."""
        return self.identity_with(self.settings.engine)

    def identity_with(self, engine: Engine) -> dict[str, Any]:
        """The identity of the same job with `sample.engine` set to `engine`."""
        effective = self.sampling.effective
        unused = {"engine": engine, "top_p": effective.top_p, "top_k": effective.top_k}
        return {
            "stage_version": STAGE_VERSION,
            "models": self._model_identities,
            "prompts": hashlib.sha256(
                canonical_json([[prompt.id, prompt.ids] for prompt in self.prompts])
            ).hexdigest(),
            "sample": self.settings.model_dump(exclude={"prompts", "num_prompts", "compare", "model"})
            | unused,
            "stop_token_ids": list(self.stop_token_ids),
            "dtype": self.compute.dtype_name,
        }

    @cached_property
    def _model_identities(self) -> dict[str, Any]:
        return {side: self._identity_of(model) for side, model in self.models.items()}

    def _identity_of(self, model: ModelSource) -> dict[str, Any]:
        """Weights and architecture, and what its folder says about the end of a completion and about its text."""
        opened = open_model(model.folder, self.sampling, self.options)
        return {
            **model_identity(model),
            "stop_token_ids": opened.stop_token_ids,
            "tokenizer": tokenizer_sha256(opened.tokenizer),
        }


def _positions(model: ModelSource) -> int | None:
    return num_positions(base_of(model) if is_adapter(model.folder) else model)


def find_completions(job: SampleJob, context: Context) -> Artifact | None:
    """The finished completions of this job, if there are any; `auto` and the engine it takes make the same ones."""
    asked, auto = job.settings.engine, auto_engine()
    engines: tuple[Engine, ...] = (asked, "auto", auto)
    for engine in dict.fromkeys(engines):
        found = context.store.find("completions", job.name, job.identity_with(engine))
        wanted = auto if asked == "auto" else asked
        if found is not None and (engine == asked or found.counts["engine"] == wanted):
            return found
    return None


def sample(job: SampleJob, context: Context) -> Artifact:
    """Generate and write all completions."""
    draft = context.store.draft("completions", job.name, "sample", job.identity)
    try:
        if job.too_long:
            context.say(f"Left out, because the model has too few positions: {', '.join(job.too_long)}")
        if job.unusable:
            context.say(f"Left out {len(job.unusable):,} rows without a prompt, the first: {job.unusable[0]}")
        context.say(f"Sampling {len(job.prompts)} prompts from {', '.join(job.models)}")
        folders = [model.folder for model in job.models.values()]
        with using_memory(f"Lower sample.max_tokens (now {job.settings.max_tokens}) or shorten the prompts."):
            engine, completions = generate(
                job.settings.engine, folders, job.prompts, job.sampling, job.options, context.say
            )
        records = []
        for (side, model), own in zip(job.models.items(), completions, strict=True):
            part = _records(job.prompts, own, model, side)
            write_alpaca_eval(part, draft.path / f"alpaca_eval-{side}.json", "align")
            records += part
        write_jsonl(records, draft.path / "completions.jsonl")
        names = {side: model.name for side, model in job.models.items()}
        counts = {
            "engine": engine,
            "num_prompts": len(job.prompts),
            "prompts_too_long": list(job.too_long),
            "prompts_unusable": list(job.unusable),
            "num_completions": len(records),
            "finished": sum(record.finish_reason == "stop" for record in records),
            "models": names,
        }
        return context.store.publish(draft, counts, names, context.config_text)
    finally:
        draft.discard()


def _records(
    prompts: Sequence[Prompt], completions: Sequence[Completion], model: ModelSource, side: str
) -> list[CompletionRecord]:
    return [
        CompletionRecord(
            id=prompts[completion.prompt_index].id,
            prompt=prompts[completion.prompt_index].content,
            completion=completion.text,
            sample_index=completion.sample_index,
            seed=completion.seed,
            finish_reason=completion.finish_reason,
            num_tokens=len(completion.token_ids),
            model=model.name,
            side=side,
        )
        for completion in completions
    ]
