"""The configuration blocks for models, compute, sampling and tracking; `data.py` and `train.py` have the others.

Every key has its default, its unit and its bounds here. No torch is imported, so that the command line answers at once.
`configs/reference.yaml` lists the same keys with the same comments; a test keeps the two equal.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# Also yes, no, on, off, 1 and 0, as people type them.
Flag = bool


def checked_name(value: str) -> str:
    """A name that cannot be taken for a path; raises `ValueError` for another one."""
    if not value.strip(".") or set(value) & set("/\\\0"):
        raise ValueError("expected a name without / and \\, and not of dots alone")
    return value


class Settings(BaseModel):
    """A block that is frozen and refuses unknown keys, NaN and infinities."""

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
    """How models run: the same for the reference and the policy."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="'auto' takes cuda if there is a GPU, else cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype of the forward pass; weights stay float32. 'auto' takes bfloat16 on a GPU that supports it, else float32",
    )
    tokens_per_batch: PositiveInt = Field(
        default=2048,
        description="token budget of one forward pass; changes speed and memory, not results (`align plan` shows both at several budgets)",
    )
    compile: Flag = Field(
        default=False,
        description="compile the model's layers by torch.compile; the first step takes longer, results differ by rounding",
    )
    trust_remote_code: Flag = Field(
        default=False,
        description="run the Python code that a model's folder brings (auto_map in its config.json): code of whoever made it",
    )
    load_in_4bit: Flag = Field(
        default=False,
        description="load the frozen weights in 4 bits (bitsandbytes, NF4 with double quantization), those of the reference and those under an adapter (QLoRA); the log-probs of such a reference are cached separately",
    )


class SampleSettings(Settings):
    """Sampling of completions."""

    model: str | None = Field(
        default=None,
        description="folder or hub name of the model to sample from; null takes the policy that this configuration trains",
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="'auto' takes vLLM if it can run, else transformers, and logs which"
    )
    prompts: str | None = Field(
        default=None,
        description="prompts to sample: a file, folder or hub dataset with a column 'prompt', 'instruction', 'question', 'messages' or 'turns', any preferences that `prepare` reads, or rows that it has made (a folder in the store); null takes the held-out prompts",
    )
    num_prompts: PositiveInt | None = Field(
        default=64, description="number of prompts, from the first on; null means all"
    )
    num_samples: PositiveInt = Field(default=1, description="completions for each prompt")
    temperature: NonNegativeFloat = Field(default=0.7, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="nucleus sampling: from the likeliest tokens that have this probability together",
    )
    top_k: NonNegativeInt = Field(
        default=0, description="sample from this many likeliest tokens; 0 means all"
    )
    max_tokens: PositiveInt = Field(default=256, description="maximum number of tokens in a completion")
    seed: NonNegativeInt = Field(
        default=0, description="seed of the run, from which each sample of each prompt derives its own"
    )
    compare: Flag = Field(
        default=False, description="also sample from the reference, with the same prompts and seeds"
    )
    on_bad_prompt: Literal["skip", "error"] = Field(
        default="skip",
        description="a prompt that cannot be completed (empty, too long for the model): leave it out, listed and counted, or stop",
    )
    tensor_parallel: PositiveInt = Field(
        default=1, description="vLLM: number of GPUs that one copy of the model is spread over"
    )
    data_parallel: PositiveInt = Field(
        default=1,
        description="vLLM: number of copies of the model, each in a process and on GPUs of its own, that share the prompts",
    )


class TrackSettings(Settings):
    """Dashboards, besides `metrics.jsonl`, which is always written."""

    wandb: Literal["disabled", "online", "offline"] = Field(
        default="disabled", description="send metrics to Weights & Biases besides metrics.jsonl"
    )
    tensorboard: Flag = Field(
        default=False, description="write TensorBoard event files to tensorboard/ in the store"
    )
    trackio: Flag = Field(
        default=False,
        description="log to trackio, locally unless its environment variables name a server",
    )
    project: str = Field(default="align", description="name of the project on W&B and trackio")
    run_name: str | None = Field(
        default=None,
        description="name of the run; null takes train.name, or else the name of the policy artifact",
    )

    @field_validator("project", "run_name")
    @classmethod
    def _is_no_path(cls, value: str | None) -> str | None:
        # Dashboards on disk name folders and files by it.
        return None if value is None else checked_name(value)
