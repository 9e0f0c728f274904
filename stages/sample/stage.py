"""Stage 4 of 4: a policy -> completions, in files that people and evaluation tools read.

Prompts are those of the held-out rows, token for token as the policy was evaluated on, or come from
a file through the same template. Writes `completions/<model>-<fingerprint>` with `completions.jsonl`
(every completion) and for each model an `alpaca_eval-<side>.json`. Run it with `align sample`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.artifacts import Artifact
from cache.errors import DataError
from cache.fingerprint import canonical_json
from stages.data.columns import Message, text_or_messages, tools_of
from stages.data.readers import BadRow, read_source
from stages.data.rows import RowSet
from stages.formats.contract import Tokens, assembled
from stages.generation.completion_files import SampleRecord, read_jsonl, write_alpaca_eval, write_jsonl
from stages.generation.generate import Completion, generate_each
from stages.generation.requests import EngineOptions, Sampling
from stages.models.adapters import model_identity
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute
from stages.runtime.context import Context
from stages.settings.data import DataSettings
from stages.settings.fields import SampleSettings
from stages.tokenization.template import Template

STAGE_VERSION = 1
PROMPT_COLUMNS = ("prompt", "instruction", "messages", "question", "turns")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id, what a person reads, and its token ids."""

    id: str
    shown: str | list[Message]
    ids: list[int]


@dataclass(frozen=True)
class SampleJob:
    """What is sampled: models by side (policy, reference, or a named one), prompts, how."""

    models: Mapping[str, ModelSource]
    prompts: list[Prompt]
    settings: SampleSettings
    compute: Compute
    stop_token_ids: tuple[int, ...]

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
        prompts = (
            heldout_prompts(rows, template)
            if settings.prompts is None
            else file_prompts(settings.prompts, template)
        )
        chosen = prompts[: settings.num_prompts]
        if not chosen:
            raise DataError(
                f"{rows.path} has no held-out prompts. Give a file with --set sample.prompts=FILE, or raise prepare.heldout_fraction."
            )
        return cls(models, chosen, settings, compute, tuple(rows.counts["turn_end_ids"]))

    @property
    def name(self) -> str:
        """Readable part of the artifact's folder name: the first model's."""
        return next(iter(self.models.values())).short_name

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn."""
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
    def identity(self) -> dict[str, Any]:
        """Everything that changes the completions."""
        return {
            "stage_version": STAGE_VERSION,
            "models": {side: model_identity(model.folder) for side, model in self.models.items()},
            "prompts": hashlib.sha256(
                canonical_json([[prompt.id, prompt.ids] for prompt in self.prompts])
            ).hexdigest(),
            "sample": self.settings.model_dump(exclude={"prompts", "num_prompts", "compare", "model"}),
            "stop_token_ids": list(self.stop_token_ids),
            "dtype": self.compute.dtype_name,
        }


def find_completions(job: SampleJob, context: Context) -> Artifact | None:
    """The finished completions of this job, if there are any."""
    return context.store.find("completions", job.name, job.identity)


def sample(job: SampleJob, context: Context) -> Artifact:
    """Generate and write all completions."""
    settings = job.settings
    draft = context.store.draft("completions", job.name, "sample", job.identity)
    try:
        context.say(f"Sampling {len(job.prompts)} prompts from {', '.join(job.models)}")
        longest = max(len(prompt.ids) for prompt in job.prompts)
        options = EngineOptions(dtype=_dtype(job.compute), max_model_length=longest + settings.max_tokens)
        folders = [model.folder for model in job.models.values()]
        ids = [prompt.id for prompt in job.prompts]
        engine, completions = generate_each(
            settings.engine,
            folders,
            [prompt.ids for prompt in job.prompts],
            ids,
            job.sampling,
            options,
            context.say,
        )
        records = []
        for (side, model), own in zip(job.models.items(), completions, strict=True):
            part = [
                _record(job.prompts[completion.prompt_index], completion, model, side) for completion in own
            ]
            write_alpaca_eval(part, draft.path / f"alpaca_eval-{side}.json", "align")
            records += part
        write_jsonl(records, draft.path / "completions.jsonl")
        finished = sum(completion.finish_reason == "stop" for own in completions for completion in own)
        counts = {
            "engine": engine,
            "num_prompts": len(job.prompts),
            "num_completions": len(records),
            "finished": finished,
            "models": {side: model.name for side, model in job.models.items()},
        }
        inputs = {side: model.name for side, model in job.models.items()}
        return context.store.publish(draft, counts, inputs, context.config_text)
    finally:
        draft.discard()


def read_completions(artifact: Artifact) -> list[dict[str, Any]]:
    """The lines of `completions.jsonl`, after checking the artifact's files."""
    artifact.check_files()
    return read_jsonl(artifact.path / "completions.jsonl")


def heldout_prompts(rows: Artifact, template: Template) -> list[Prompt]:
    """Each distinct held-out prompt once, in the order of the rows."""
    heldout = RowSet.of(rows, "heldout")
    prompts: dict[tuple[int, ...], Prompt] = {}
    for start in heldout.starts:
        ids = heldout.prompt(start).tolist()
        if tuple(ids) not in prompts:
            shown = template.tokenizer.decode(ids, skip_special_tokens=True)
            prompts[tuple(ids)] = Prompt(heldout.example_ids[start], shown, ids)
    return list(prompts.values())


def file_prompts(path: str, template: Template) -> list[Prompt]:
    """The prompts of a file; raises `DataError` naming the row that has none."""
    if not Path(path).expanduser().is_file():
        raise DataError(
            f"No such file of prompts: {path}. Give a .jsonl or .json file with --set sample.prompts=FILE."
        )
    found = []
    for row in read_source(DataSettings(path=path)):
        try:
            if row.value is None:
                raise BadRow(row.problem)
            shown, tools = prompt_of_row(row.value)
            text, plain = template.prompt_text(shown, tools)
            found.append((row.location, shown, text, plain))
        except BadRow as problem:
            raise DataError(f"{row.location}: {problem}.") from problem
    ids = template.encode_prompts([text for *_, text, _ in found], [plain for *_, plain in found])
    return [Prompt(location, shown, tokens) for (location, shown, *_), tokens in zip(found, ids, strict=True)]


def prompt_of_row(row: Mapping[str, Any]) -> tuple[str | list[Message], list[Any] | None]:
    """The prompt of a row and its tools; raises `BadRow`.

    `turns` (MT-bench) is asked its first question. A `messages` column may end with an answer, which is left out.
    """
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise BadRow(
            f"expected one of the columns {', '.join(PROMPT_COLUMNS)}, found {', '.join(sorted(row))}"
        )
    value = row[column]
    shown = text_or_messages({column: value[0] if column == "turns" and value else value}, column)
    while not isinstance(shown, str) and shown[-1]["role"] == "assistant":
        if column != "messages" or len(shown) == 1:
            raise BadRow(f"{column}: ends with an assistant turn, so there is nothing to answer")
        shown = shown[:-1]
    prompt = assembled(row, shown, []).prompt
    return shown if isinstance(prompt, Tokens) else prompt, tools_of(row)


def _record(prompt: Prompt, completion: Completion, model: ModelSource, side: str) -> SampleRecord:
    return SampleRecord(
        id=prompt.id,
        prompt=prompt.shown,
        completion=completion.text,
        sample_index=completion.sample_index,
        seed=completion.seed,
        finish_reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
        model=model.name,
        side=side,  # type: ignore[arg-type]
    )


def _dtype(compute: Compute) -> Any:
    return compute.dtype_name
