"""The configuration blocks of data: its sources, filters, how it becomes rows, and evaluation sets."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from stages.settings.fields import (
    Flag,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
)

# What a value of a label or verdict column means; None drops the row.
Meaning = bool | Literal["a", "b", "tie"] | None


def _text_keys(value: Any) -> Any:
    """A map with its keys as text: YAML reads 1 as a number and true as a truth value."""
    if not isinstance(value, Mapping):
        return value
    return {key if isinstance(key, str) else str(key).casefold(): meant for key, meant in value.items()}


Labels = Annotated[dict[str, Meaning], BeforeValidator(_text_keys)]
EvalSetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class SourceSettings(Settings):
    """One of several sources: a path as in `data.path`, and its share of the mixture."""

    path: str
    name: str | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None
    ignore: list[str] = Field(default=[])
    labels: Labels | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: PositiveFloat | None = None
    count: PositiveInt | None = None


class DataSettings(Settings):
    """Sources of preference data."""

    path: str = Field(
        default="quickstart",
        description="a file (.jsonl, .json, .parquet, .arrow, .csv, .tsv, .xlsx; JSON and CSV also as .gz), a folder of such files (a clone of a hub dataset, or what save_to_disk wrote), a dataset on the Hugging Face hub, or 'quickstart'",
    )
    format: str = Field(
        default="auto",
        description="layout of the rows; 'auto' detects it from the columns and prints it",
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="for any other layout: maps the column names of a known format to those of the source",
    )
    ignore: list[str] = Field(
        default=[],
        description="columns left out on purpose, such as context or images; one that changes what the rows mean stops the stage until it is used or named here",
    )
    labels: Labels | None = Field(
        default=None,
        description="what the values of a label or verdict column mean: {up: true, down: false}, or a, b and tie, for example {'<0': a, '>0': b, '0': tie}; null drops the row. Words of one meaning need no map",
    )
    ties: Literal["drop", "half"] = Field(
        default="drop",
        description="two responses judged equal: drop the row, or keep both orders as pairs, each with half the weight",
    )
    threshold: float | None = Field(
        default=None,
        description="single scored responses are desirable from this score on, and labels that are numbers true",
    )
    config: str | None = Field(
        default=None, description="configuration name of a hub dataset or of a local folder"
    )
    split: str = Field(default="train", description="split of a hub dataset or of a local folder")
    revision: str | None = Field(default=None, description="git revision of a hub dataset")
    sources: list[SourceSettings] = Field(
        default=[],
        description="several sources instead of path: each with path, and optionally name, format, columns, ignore, labels, config, split, revision, and a weight (share of the mixture) or a count (rows)",
    )
    seed: NonNegativeInt = Field(
        default=0, description="seed of the subsample where a source has a weight or a count"
    )
    max_samples: PositiveInt | None = Field(
        default=None, description="maximum number of source rows; the first ones are used"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="a malformed row: stop with its file and line, or skip it and list it in rejected.jsonl",
    )


class FilterSettings(Settings):
    """Rows that are dropped on purpose, each counted by its reason."""

    min_prompt_tokens: PositiveInt | None = Field(
        default=None, description="minimum tokens of the prompt before truncation"
    )
    max_prompt_tokens: PositiveInt | None = Field(
        default=None, description="maximum tokens of the prompt before truncation"
    )
    min_completion_tokens: PositiveInt | None = Field(
        default=None, description="minimum tokens of every completion before truncation"
    )
    max_completion_tokens: PositiveInt | None = Field(
        default=None, description="maximum tokens of every completion before truncation"
    )
    min_score_gap: NonNegativeFloat | None = Field(
        default=None,
        description="minimum difference between the scores of the best and the worst completion; rows without scores are dropped too",
    )
    language: str | None = Field(
        default=None, description="keep only rows with this value in the language column; case does not count"
    )
    language_column: str = Field(default="language", description="the column of language tags")
    drop_pattern: str | None = Field(
        default=None,
        description="regular expression; a row is dropped if a text of its prompt or of a completion matches anywhere",
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="keep duplicates, or drop rows that repeat the prompt and completions of an earlier row exactly or nearly (near: extra 'dedup')",
    )
    near_duplicate_similarity: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8,
        description="Jaccard similarity of five-word sequences from which on two rows are near duplicates (estimated by MinHash)",
    )
    decontaminate: list[str] = Field(
        default=[],
        description="files of evaluation prompts (as sample.prompts); a row is dropped if its prompt contains one",
    )
    decontaminate_words: PositiveInt = Field(
        default=13,
        description="consecutive words of an evaluation prompt that count as a match; a shorter prompt must match as a whole",
    )


class PrepareSettings(Settings):
    """Tokens, masks, truncation and the held-out split."""

    template: str = Field(
        default="auto",
        description="'chat' uses the tokenizer's chat template, 'plain' joins the texts, 'auto' uses chat if there is a template, else plain; or chatml, zephyr, tulu, or the path of a Jinja file",
    )
    thinking: Literal["auto", "on", "off", "empty"] = Field(
        default="auto",
        description="models that think first: 'auto' leaves the template's default and trains a row's reasoning, or an empty thinking block where the row has none and the prompt opens one; 'on' switches thinking on and drops rows without reasoning; 'off' switches it off and 'empty' leaves the block empty, both without the rows' reasoning",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="arguments of the chat template, such as enable_thinking: false; a column chat_template_kwargs adds those of a row",
    )
    system: Literal["refuse", "fold"] = Field(
        default="refuse",
        description="a system turn where the chat template has none: refuse the row, or fold its text into the first user turn",
    )
    append_eos: Flag = Field(
        default=True,
        description="end each completion with the end-of-sequence token unless the chat template ends the turn with one; false for completions that are cut off in the data",
    )
    max_length: PositiveInt = Field(
        default=1024, description="maximum tokens of prompt and completion together"
    )
    max_prompt_length: PositiveInt | None = Field(default=None, description="maximum tokens of the prompt")
    max_completion_length: PositiveInt | None = Field(
        default=None, description="maximum tokens of a completion; the rest is cut off"
    )
    truncation_mode: Literal["keep_end", "keep_start"] = Field(
        default="keep_end",
        description="beyond max_length, keep_end cuts the start of the prompt, keep_start cuts the end of the completions",
    )
    heldout_fraction: Share = Field(
        default=0.05,
        description="share of conversations held out for evaluation, chosen by a hash of the prompt up to its first user turn",
    )
    mismatched: Flag = Field(
        default=True,
        description="add KTO's mismatched rows (each prompt with the completions of another); false saves the time to score them in cache-ref",
    )
    graded: Literal["best_worst", "ranked"] = Field(
        default="best_worst",
        description="graded responses: keep the best and the worst as a pair, or all as a ranked list from which train.pairs forms pairs",
    )
    tokenizer: Literal["tokenizers", "fastokens"] = Field(
        default="tokenizers",
        description="library that tokenizes; fastokens (extra 'fast') is several times as fast, and a sample of its ids is checked against tokenizers",
    )
    num_workers: PositiveInt = Field(
        default=1,
        description="processes that render and tokenize; changes speed, not results. One process uses two cores",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _refuse_own_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted({"messages", "tools", "add_generation_prompt"} & value.keys()):
            raise ValueError(
                f"{', '.join(own)} comes from the rows; expected other arguments of the template"
            )
        return value


class EvalSettings(Settings):
    """Evaluation beyond the held-out rows, during training and by `align eval`."""

    sets: dict[EvalSetName, DataSettings] = Field(
        default={},
        description="more evaluation sets by name, each a path or a block like data; their metrics are eval/<name>/...",
    )
    model: str | None = Field(
        default=None,
        description="folder or hub name of the model that `align eval` evaluates; null means the policy of this configuration",
    )

    @field_validator("sets", mode="before")
    @classmethod
    def _read_paths(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: {"path": given} if isinstance(given, str) else given for name, given in value.items()}
