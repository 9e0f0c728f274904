"""Configuration blocks of models, compute, sampling and tracking; `data.py` and `train.py` have the others.

Every key has its default, unit and bounds in one of the three. They import no torch, so that the command line
answers fast. `configs/reference.yaml` lists the same keys with the same comments; a test keeps the two equal.
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
    """Frozen; refuses unknown keys, NaN and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ModelSettings(Settings):
    """A causal language model: a local folder, a hub name, or 'quickstart'."""

    model: str = Field(default="quickstart", description="folder or hub name of the model to train")
    revision: str | None = Field(default=None, description="git revision of a hub model")


class ReferenceSettings(Settings):
    """The frozen reference model."""

    model: str | None = Field(
        default=None, description="folder or hub name of the reference; null takes the policy before training"
    )
    revision: str | None = Field(default=None, description="git revision of a hub model")


class ComputeSettings(Settings):
    """How models run; policy and reference always run the same way."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="'auto' takes cuda if there is a GPU, else cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype of the forward pass; weights stay float32. 'auto' takes bfloat16 on a GPU that supports it, else float32",
    )
    tokens_per_batch: PositiveInt = Field(
        default=2048, description="token budget of one forward pass; changes speed and memory, not results"
    )
    load_in_4bit: Flag = Field(
        default=False,
        description="load frozen weights in 4 bits (bitsandbytes, NF4 with double quantization): those of the reference and those under an adapter (QLoRA); cached apart from the log-probs of the whole weights",
    )


class SampleSettings(Settings):
    """Generation for evaluation."""

    model: str | None = Field(
        default=None,
        description="folder or hub name of the model to sample from; null takes the policy that this configuration trains",
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="'auto' takes vLLM where it runs, else transformers, with a message"
    )
    prompts: str | None = Field(
        default=None,
        description="file of prompts (.jsonl, .json, .parquet; a column 'prompt', 'instruction', 'question', 'messages' or MT-bench's 'turns'); null takes the held-out prompts",
    )
    num_prompts: PositiveInt | None = Field(default=64, description="use only the first N prompts")
    num_samples: PositiveInt = Field(default=1, description="completions per prompt")
    temperature: NonNegativeFloat = Field(
        default=0.7, description="sampling temperature; 0 is greedy decoding"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="nucleus sampling: keep the most likely tokens of this total probability"
    )
    top_k: NonNegativeInt = Field(default=0, description="keep the k most likely tokens; 0 keeps all")
    max_tokens: PositiveInt = Field(default=256, description="tokens in a completion, at most")
    seed: NonNegativeInt = Field(
        default=0, description="seed of the run, from which each sample of each prompt derives its own"
    )
    compare: Flag = Field(
        default=False, description="also sample from the reference, with the same prompts and seeds"
    )


class TrackSettings(Settings):
    """Dashboards that metrics go to besides `metrics.jsonl`."""

    wandb: Literal["disabled", "online", "offline"] = Field(
        default="disabled", description="mode of Weights & Biases"
    )
    tensorboard: Flag = Field(
        default=False, description="write TensorBoard event files to tensorboard/ in the store"
    )
    trackio: Flag = Field(
        default=False,
        description="log to trackio: on this machine, or where its environment variables point",
    )
    project: str = Field(default="align", description="name of the project on W&B and trackio")
    run_name: str | None = Field(
        default=None, description="name of the run; null takes the name of the policy artifact"
    )
