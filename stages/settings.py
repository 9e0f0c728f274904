"""The configuration blocks of the four stages: every knob, its default, its unit, in one place.

Plain data without torch, so that the command line answers at once. `configs/reference.yaml` lists the
same keys with the same comments; a test keeps the two equal.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
EvalSetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
SampleStrategy = Literal["fixed", "round_robin", "random"]
PairStrategy = Literal["best_worst", "all", "adjacent"]


class Settings(BaseModel):
    """Frozen, with unknown keys, NaN and infinities refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


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


class ModelSettings(Settings):
    """A causal language model: a local folder, a hub name, or 'quickstart'."""

    model: str = Field(default="quickstart", description="folder or hub name of the model to train")
    revision: str | None = Field(default=None, description="git revision of a hub model")


class ReferenceSettings(Settings):
    """The frozen reference model."""

    model: str | None = Field(
        default=None, description="folder or hub name of the reference; null means the policy before training"
    )
    revision: str | None = Field(default=None, description="git revision of a hub model")


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


class ComputeSettings(Settings):
    """How models run; the reference and the policy always run the same way."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="'auto' takes cuda where there is one, else cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="arithmetic of the forward pass; weights stay float32. 'auto' is bfloat16 on a GPU that has it, else float32",
    )
    tokens_per_batch: PositiveInt = Field(
        default=2048, description="token budget of one forward pass; changes speed and memory, not results"
    )
    load_in_4bit: Flag = Field(
        default=False,
        description="keep the frozen weights in 4 bits (bitsandbytes, NF4 with double quantization), for the reference and under an adapter alike (QLoRA); a model of its own to the cache",
    )


class AdapterSettings(Settings):
    """A low-rank adapter to train instead of the model's own weights, through peft."""

    name: Literal["none", "lora", "dora"] = Field(
        default="none", description="'none' trains all weights; 'lora' and 'dora' train an adapter"
    )
    r: PositiveInt = Field(default=16, description="rank of the update of each matrix")
    lora_alpha: PositiveInt = Field(
        default=32,
        description="the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)",
    )
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="names of the matrices to adapt, a list or a regular expression; 'all-linear' takes all but the output layer",
    )
    use_rslora: Flag = Field(
        default=False, description="rank-stabilised scaling, which keeps high ranks learning"
    )


class TrainSettings(Settings):
    """The training loop; a step is `batch_size` examples however they are split over memory and ranks."""

    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate; null takes the loss's own recommendation, ten times that for an adapter",
    )
    batch_size: PositiveInt | None = Field(
        default=None,
        description="examples (pairs or ranked lists) in one optimizer step, over all ranks; null takes the loss's own",
    )
    pairs: PairStrategy = Field(
        default="best_worst",
        description="pairs formed from a ranked list: its best with its worst, all with different scores, or neighbours in rank",
    )
    num_epochs: PositiveInt = Field(default=1, description="passes over the training examples")
    max_steps: PositiveInt | None = Field(default=None, description="stop after so many optimizer steps")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "constant",
        "constant_with_warmup",
    ] = Field(
        default="linear",
        description="shape of the learning rate after warm-up, ending at the last step; as in transformers",
    )
    lr_scheduler_kwargs: dict[str, float | int | str] = Field(
        default={},
        description="further arguments of the schedule, by transformers' names, for example {min_lr_rate: 0.1}",
    )
    warmup_ratio: Share = Field(
        default=0.1,
        description="share of the steps in which the learning rate rises; the first step is above 0",
    )
    optimizer: Literal[
        "adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit", "adafactor", "rmsprop", "sgd"
    ] = Field(
        default="adamw",
        description="adamw keeps 8 bytes of state a weight, adamw_bf16 4, adamw_8bit and paged_adamw_8bit 2 (bitsandbytes; paged lets them spill to the host), rmsprop 4, adafactor and sgd next to none",
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="weight decay, on matrices only")
    adam_beta1: Decay = Field(default=0.9, description="AdamW beta1")
    adam_beta2: Decay = Field(default=0.999, description="AdamW beta2")
    adam_epsilon: PositiveFloat = Field(default=1e-8, description="AdamW epsilon")
    max_grad_norm: NonNegativeFloat = Field(
        default=1.0, description="clip the step's gradient to this norm; 0 does not clip"
    )
    gradient_checkpointing: Flag = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, about a third more time",
    )
    activation_offload: Flag = Field(
        default=False,
        description="keep activations in the host's memory until the backward pass (GPU only): less memory, slower",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="under torchrun: 'ddp' keeps the whole model on every rank, 'fsdp' shards weights, gradients and optimizer over the ranks",
    )
    seed: NonNegativeInt = Field(
        default=0, description="order of the examples, and an adapter's first weights"
    )
    eval_steps: PositiveInt | None = Field(
        default=None,
        description="evaluate every so many steps, besides step 0 and the end; null means five times in a run",
    )
    eval_samples: PositiveInt | None = Field(
        default=512, description="held-out examples to evaluate on, always the same; null means all"
    )
    save_steps: PositiveInt | None = Field(
        default=None, description="write a checkpoint every so many steps; null means at evaluation steps"
    )
    keep_last: NonNegativeInt = Field(
        default=0,
        description="checkpoints left in the finished policy, the last ones; while training the newest two are always there",
    )
    best_metric: str | None = Field(
        default=None,
        description="held-out metric whose best checkpoint is kept too, for example rewards/accuracies",
    )
    save_best: Flag = Field(
        default=False,
        description="publish the weights of the best evaluation by best_metric, not the last",
    )
    early_stopping_metric: str | None = Field(
        default=None,
        description="stop when this held-out metric no longer improves, for example loss",
    )
    early_stopping_patience: PositiveInt = Field(
        default=3, description="evaluations in a row without improvement before the run stops"
    )
    sample_steps: PositiveInt | None = Field(
        default=None,
        description="sample the policy every so many steps, besides step 0 and the end, as the block sample says; null means never",
    )
    sample_prompts: PositiveInt = Field(
        default=4, description="prompts sampled each time, from the pool that the block sample gives"
    )
    sample_strategy: SampleStrategy = Field(
        default="fixed",
        description="which of the pool: always the first, the next ones in turn, or a random draw",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a step whose loss or gradient is NaN or infinite: stop, naming step and rows, or leave the weights as they are and count it",
    )
    resume: str | None = Field(
        default=None,
        description="checkpoint folder to continue from, of another run too; null means this run's own newest one",
    )
    resume_override: list[str] = Field(
        default=[],
        description="fields that may differ from the run that `resume` continues, for example [train.learning_rate]",
    )


class SampleSettings(Settings):
    """Generation for evaluation."""

    model: str | None = Field(
        default=None,
        description="folder or hub name to sample from; null means the policy this configuration trains",
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="'auto' takes vLLM where it can run, else transformers, and says so"
    )
    prompts: str | None = Field(
        default=None,
        description="file of prompts (.jsonl, .json, .parquet; a column 'prompt', 'instruction', 'question', 'messages' or MT-bench's 'turns'); null means the held-out prompts",
    )
    num_prompts: PositiveInt | None = Field(default=64, description="use only the first so many prompts")
    num_samples: PositiveInt = Field(default=1, description="completions for each prompt")
    temperature: NonNegativeFloat = Field(default=0.7, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="nucleus sampling")
    top_k: NonNegativeInt = Field(default=0, description="0 keeps all tokens")
    max_tokens: PositiveInt = Field(default=256, description="tokens in a completion")
    seed: NonNegativeInt = Field(
        default=0, description="each (prompt, sample) has its own seed, derived from this one"
    )
    compare: Flag = Field(
        default=False, description="also sample from the reference, on the same prompts and seeds"
    )


class EvalSettings(Settings):
    """Evaluation besides the held-out rows, while training and by `align eval`."""

    sets: dict[EvalSetName, DataSettings] = Field(
        default={},
        description="further evaluation sets by name, each a path or a block like data; metrics under eval/<name>/",
    )
    model: str | None = Field(
        default=None,
        description="folder or hub name that `align eval` evaluates; null means the policy this configuration trains",
    )

    @field_validator("sets", mode="before")
    @classmethod
    def _read_paths(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: {"path": given} if isinstance(given, str) else given for name, given in value.items()}


class TrackSettings(Settings):
    """Dashboards; `metrics.jsonl` is written in any case."""

    wandb: Literal["disabled", "online", "offline"] = Field(
        default="disabled", description="Weights & Biases: where to send metrics besides metrics.jsonl"
    )
    tensorboard: Flag = Field(
        default=False, description="write TensorBoard event files into tensorboard/ in the store"
    )
    trackio: Flag = Field(
        default=False,
        description="log to trackio, on this machine unless its environment variables say where",
    )
    project: str = Field(default="align", description="project on W&B and trackio")
    run_name: str | None = Field(
        default=None, description="name of the run; null takes the name of the policy artifact"
    )
