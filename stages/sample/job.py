"""What `sample` makes: models, prompts, how to sample, and what identifies the completions of one model."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from cache.artifacts import Artifact
from cache.errors import DataError
from cache.fingerprint import canonical_json
from stages.data.messages import Message
from stages.formats.contract import Preference
from stages.generation.contract import EngineName
from stages.generation.open_model import open_model, problem_of
from stages.generation.requests import EngineOptions, Model, Prompt, Sampling
from stages.models.identity import model_identity
from stages.models.loading import ModelSource
from stages.models.vocabulary import TokensInUse, tokenizer_sha256
from stages.runtime.compute import Compute
from stages.sample.prompt_sets import PromptSet, conversation
from stages.sample.prompts import prompts_of, text_of
from stages.settings.fields import SampleSettings
from stages.tokenization.template import Template

STAGE_VERSION = 2


@dataclass(frozen=True)
class SampleJob:
    """Models by side (policy, reference, or model for a named one), the prompts that all of them can complete, settings.

    `set` writes the files of evaluation tools. `left_out` says of each prompt that is not sampled, why. `encode` makes the
    token ids of the messages of a later turn.
    """

    models: Mapping[str, ModelSource]
    prompts: list[Prompt]
    settings: SampleSettings
    compute: Compute
    stop_token_ids: tuple[int, ...]
    set: type[PromptSet] = PromptSet
    left_out: tuple[str, ...] = ()
    encode: Callable[[list[Message]], list[int]] = field(default=lambda messages: [])

    @classmethod
    def of(
        cls,
        models: Mapping[str, ModelSource],
        rows: Artifact,
        template: Template,
        settings: SampleSettings,
        compute: Compute,
    ) -> "SampleJob":
        """Collect the prompts. Raises `DataError` when none can be sampled, or one with `sample.on_bad_prompt: error`."""
        found = prompts_of(settings.prompts, rows, template, settings.num_prompts)
        if not found.prompts:
            raise DataError(
                f"{rows.path} has no held-out prompts. Give a file with --set sample.prompts=FILE, or raise prepare.heldout_fraction."
            )

        def encode(messages: list[Message]) -> list[int]:
            [ids] = template.encoder.encode_texts([text_of(Preference(messages, []), template)])
            return ids.tolist()

        stops = tuple(rows.counts["turn_end_ids"])
        job = cls(models, found.prompts, settings, compute, stops, found.set, found.problems, encode)
        return job.with_possible_prompts()

    def with_possible_prompts(self) -> "SampleJob":
        """The same job without the prompts that a model cannot complete."""
        opened = [self.open(model) for model in self.models.values()]
        possible, left_out = [], list(self.left_out)
        for prompt in self.prompts:
            problem = next(filter(None, (problem_of(prompt, model) for model in opened)), None)
            if problem is None:
                possible.append(prompt)
            else:
                left_out.append(f"{prompt.id}: {problem}")
        if left_out and (not possible or self.settings.on_bad_prompt == "error"):
            rest = "" if possible else f" None of {len(left_out):,} prompts can be sampled."
            skip = "" if not possible else " Mend it, or leave it out with --set sample.on_bad_prompt=skip."
            raise DataError(f"{left_out[0]}.{rest}{skip}")
        return replace(self, prompts=possible, left_out=tuple(left_out))

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
    def num_turns(self) -> int:
        """The largest number of answers of a prompt."""
        return max(1 + len(prompt.next_turns) for prompt in self.prompts)

    @cached_property
    def options(self) -> EngineOptions:
        """How the engine runs."""
        settings = self.settings
        return EngineOptions(
            self.compute.dtype_name,
            max_model_length=max(map(self._length, self.prompts)),
            tensor_parallel_size=settings.tensor_parallel,
            data_parallel_size=settings.data_parallel,
            trust_remote_code=any(model.runs_code for model in self.models.values()),
        )

    def _length(self, prompt: Prompt) -> int:
        """Tokens of a prompt with all its turns, each answer as long as it may get."""
        answers = [("", question) for question in prompt.next_turns]
        ids = self.encode(conversation(prompt.content, answers)) if answers else prompt.ids
        return len(ids) + (1 + len(answers)) * self.settings.max_tokens

    def open(self, model: ModelSource) -> Model:
        """The model's configuration, tokenizer and end tokens."""
        return open_model(model.folder, self.sampling, self.options)

    def check_tokens(self, tokenizer: Any, log: Callable[[str], None]) -> None:
        """Raise `UsageError` if the prompts, which `tokenizer` made, are other tokens to a model."""
        used = TokensInUse(
            tokenizer, lambda: sorted({token for prompt in self.prompts for token in prompt.ids})
        )
        for model in self.models.values():
            remedy = f"Sample it with prompts of its own: prepare them with --set policy.model={model.name}"
            used.check(model, "The model", remedy, log)

    def identity(self, side: str, engine: EngineName) -> dict[str, Any]:
        """Everything that changes the completions of the model on that side; the other model is no part of it."""
        sampling = asdict(self.sampling.effective)
        prompts = [[one.id, one.ids, one.temperature, one.next_turns, one.keys] for one in self.prompts]
        return {
            "stage_version": STAGE_VERSION,
            "model": self._model_identities[side],
            "prompts": hashlib.sha256(canonical_json(prompts)).hexdigest(),
            "set": self.set.name,
            "sampling": sampling,
            "engine": engine,
            "dtype": self.compute.dtype_name,
        }

    @cached_property
    def _model_identities(self) -> dict[str, Any]:
        return {side: self._identity_of(model) for side, model in self.models.items()}

    def _identity_of(self, model: ModelSource) -> dict[str, Any]:
        """Weights and architecture, and what its folder says about the end of a completion and about its text."""
        opened = self.open(model)
        return {
            **model_identity(model),
            "stop_token_ids": opened.stop_token_ids,
            "tokenizer": tokenizer_sha256(opened.tokenizer),
        }
