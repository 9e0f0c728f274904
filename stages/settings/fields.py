"""Configuration blocks: models, arithmetic, sampling, tracking; those of data and of training stand beside.

Every knob has its default, its unit and its bounds here, in `data_settings.py` or in `train_settings.py`.
Plain data without torch, so that the command line answers at once. `configs/reference.yaml` lists the
same keys with the same comments; a test keeps the two equal.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]


class Settings(BaseModel):
    """Frozen, with unknown keys, NaN and infinities refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


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
