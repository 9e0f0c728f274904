"""The configuration blocks of preference data: where it comes from, what is left out, how it becomes rows.

Plain data, as in `settings.py`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.settings.fields import (
    Flag,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
)

EvalSetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class SourceSettings(Settings):
    """One of several sources: a path as in `data.path`, and its share of the mixture."""

    path: str
    name: str | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: PositiveFloat | None = None
    count: PositiveInt | None = None


class DataSettings(Settings):
    """Where preference data comes from."""

    path: str = Field(
        default="quickstart",
        description="a file (.jsonl, .json, .parquet, .arrow; JSON also as .gz) or a folder of such files, a dataset on the Hugging Face hub, or 'quickstart'",
    )
    format: str = Field(
        default="auto",
        description="how rows are laid out; 'auto' looks at the columns and says what it found",
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="for any other layout: from the names of a known format to the source's own columns",
    )
    ties: Literal["drop", "half"] = Field(
        default="drop",
        description="two responses judged equal: drop the row, or take both as chosen and as rejected, each with half the weight",
    )
    threshold: float | None = Field(
        default=None,
        description="single scored responses: desirable from this score on",
    )
    config: str | None = Field(default=None, description="configuration name of a hub dataset")
    split: str = Field(default="train", description="split of a hub dataset")
    revision: str | None = Field(default=None, description="git revision of a hub dataset")
    sources: list[SourceSettings] = Field(
        default=[],
        description="several sources in place of path: each with path and, where wanted, name, format, columns, config, split, revision, and a weight (share of the mixture) or a count (rows)",
    )
    seed: NonNegativeInt = Field(
        default=0, description="which rows are taken of a source that is not taken whole"
    )
    max_samples: PositiveInt | None = Field(
        default=None, description="use only the first so many source rows"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="a malformed row: stop, naming file and line, or skip it and list it in rejected.jsonl",
    )


class FilterSettings(Settings):
    """Which rows are left out on purpose; each is counted by its reason."""

    min_prompt_tokens: PositiveInt | None = Field(default=None, description="tokens in the prompt, uncut")
    max_prompt_tokens: PositiveInt | None = Field(default=None, description="tokens in the prompt, uncut")
    min_completion_tokens: PositiveInt | None = Field(
        default=None, description="tokens in every completion, uncut"
    )
    max_completion_tokens: PositiveInt | None = Field(
        default=None, description="tokens in every completion, uncut"
    )
    min_score_gap: NonNegativeFloat | None = Field(
        default=None,
        description="score of the best completion less that of the worst; rows without scores are dropped too",
    )
    language: str | None = Field(
        default=None, description="keep only rows whose language column holds this, in any case"
    )
    language_column: str = Field(default="language", description="the source's column of language tags")
    drop_pattern: str | None = Field(
        default=None,
        description="regular expression; a row is dropped where it is found in a text of the prompt or of a completion",
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="drop rows with the prompt and completions of an earlier one: the same ones, or nearly (extra 'dedup')",
    )
    near_duplicate_similarity: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8,
        description="near duplicates share at least this part of their five-word sequences (Jaccard, estimated by MinHash)",
    )
    decontaminate: list[str] = Field(
        default=[],
        description="files of evaluation prompts (as sample.prompts); rows are dropped whose prompt holds or repeats one",
    )
    decontaminate_words: PositiveInt = Field(
        default=13,
        description="so many words of an evaluation prompt in a row are a match; a shorter one must be matched whole",
    )


class PrepareSettings(Settings):
    """Tokens, masks, truncation and the held-out split."""

    template: str = Field(
        default="auto",
        description="'chat' uses the tokenizer's chat template, 'plain' joins the texts, 'auto' takes chat where there is one; or chatml, zephyr, tulu, or the path of a Jinja file",
    )
    append_eos: Flag = Field(
        default=True,
        description="end each completion with the end-of-sequence token unless the chat template closed the turn; false for continuations that were cut",
    )
    max_length: PositiveInt = Field(default=1024, description="tokens in prompt and completion together")
    max_prompt_length: PositiveInt | None = Field(default=None, description="tokens in the prompt")
    max_completion_length: PositiveInt | None = Field(
        default=None, description="tokens in a completion; the rest of it is cut off"
    )
    truncation_mode: Literal["keep_end", "keep_start"] = Field(
        default="keep_end",
        description="over max_length: keep_end cuts the prompt from its left, keep_start cuts the completions from their right",
    )
    heldout_fraction: Share = Field(
        default=0.05,
        description="share of prompts held out for evaluation, chosen by a hash of the prompt's text",
    )
    mismatched: Flag = Field(
        default=True,
        description="add KTO's mismatched rows (each prompt with another prompt's completions); false saves their share of cache-ref",
    )
    graded: Literal["best_worst", "ranked"] = Field(
        default="best_worst",
        description="graded responses: keep the best and the worst as a pair, or all of them as a ranked list from which train.pairs forms pairs",
    )
    tokenizer: Literal["tokenizers", "fastokens"] = Field(
        default="tokenizers",
        description="library that encodes; fastokens (extra 'fast') gives the same ids several times as fast, and is checked against tokenizers while it does",
    )
    num_workers: PositiveInt = Field(
        default=1,
        description="processes that render and tokenize; changes speed, not results. One already uses two cores",
    )


class EvalSettings(Settings):
    """Evaluation beyond the held-out rows, during training and by `align eval`."""

    sets: dict[EvalSetName, DataSettings] = Field(
        default={},
        description="further evaluation sets by name, each a path or a block like data; their metrics are named eval/<name>/...",
    )
    model: str | None = Field(
        default=None,
        description="folder or hub name of the model that `align eval` evaluates; null takes the policy that this configuration trains",
    )

    @field_validator("sets", mode="before")
    @classmethod
    def _read_paths(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: {"path": given} if isinstance(given, str) else given for name, given in value.items()}
