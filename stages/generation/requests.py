"""What a generation engine is given: models, prompts and requests, and how to sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache.errors import UsageError
from stages.data.messages import Message

# vLLM raises any temperature in between to 0.01 and refuses more than 2.
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete: its id, its text or messages for people to read, and its token ids.

    `temperature` takes the place of the run's. `next_turns` are the user turns that follow, each after the answer to
    the one before. `keys` are the prompt's own ids and categories, which its completions carry.
    """

    id: str
    content: str | list[Message]
    ids: list[int]
    temperature: float | None = None
    next_turns: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How to sample: temperature 0 is greedy, top_k 0 keeps every token, max_tokens is per completion."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    num_samples: int
    stop_token_ids: tuple[int, ...] = ()

    @property
    def effective(self) -> "Sampling":
        """Without settings that have no effect: greedy sampling takes the likeliest token, whatever the others."""
        return replace(self, top_p=1.0, top_k=0) if self.temperature == 0 else self

    def __post_init__(self) -> None:
        """Raise `UsageError` for values that the engines would treat differently."""
        allowed = {
            "temperature": (
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
                "0 (greedy) or 0.01 to 2",
            ),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (every token) or more"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "num_samples": (self.num_samples >= 1, "1 or more"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                raise UsageError(
                    f"sample.{name} is {getattr(self, name)}; expected {expected}. Set it with --set sample.{name}=VALUE"
                )


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs.

    dtype: float32 or bfloat16.
    max_model_length: prompt and completion together, in tokens; the model's own number of positions
        is the limit where that is smaller.
    tensor_parallel_size: vLLM only: the number of GPUs that one copy of the model is spread over.
    data_parallel_size: vLLM only: the number of copies of the model, each in a process and on GPUs of its own.
    kv_cache_bytes: vLLM on a CPU only; None means 512 MiB, or more where two sequences of full length need it.
    enforce_eager: vLLM on CUDA only: start faster without CUDA graphs. On a CPU vLLM always runs eagerly.
    gpu_memory_utilization: vLLM on CUDA only: the share of the device's memory that vLLM may take.
    trust_remote_code: whether Python code in the model's folder may run.
    """

    dtype: str
    max_model_length: int
    kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Request:
    """One completion to generate: its place among the prompts and samples, its seed, the prompt's ids, the temperature."""

    prompt_index: int
    sample_index: int
    seed: int
    prompt_ids: list[int]
    temperature: float


@dataclass(frozen=True)
class Model:
    """A model folder opened for sampling: `max_length` in tokens, and the ids that end a completion.

    `adapter` is a peft folder whose base model is in `path`.
    """

    path: Path
    config: Any
    tokenizer: Any
    max_length: int
    stop_token_ids: list[int]
    adapter: Path | None = None
