"""Completions from token ids, whichever engine runs.

Every (row, turn, sample) is its own request with a seed hashed from (run seed, row id, sample index), so a
completion does not depend on which other prompts are sampled with it: exactly on the transformers
engine, and up to the rounding of a batched forward on vLLM (none seen in float32 on a CPU; on CUDA set
VLLM_BATCH_INVARIANT=1). Both engines take token ids and return token ids; the end of a completion, its finish reason
and its text are determined here, for both.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.generation.contract import Engine
from stages.generation.open_model import check_prompts
from stages.generation.requests import EngineOptions, Model, Prompt, Request, Sampling


@dataclass(frozen=True)
class Completion:
    """One sampled completion; `token_ids` ends with the stop token when `finish_reason` is "stop", `text` does not."""

    prompt_index: int
    sample_index: int
    seed: int
    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]


def request_seed(run_seed: int, row_id: str, sample_index: int) -> int:
    """Seed of one request, a function of these three alone.

    53 bits, because that is the largest integer every JSON reader keeps exact. A hash, because vLLM gives
    equal seeds equal noise: with `run_seed + row` the samples of neighbouring rows would share theirs.
    """
    key = json.dumps([run_seed, row_id, sample_index]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11


def requests_of(prompts: Sequence[Prompt], sampling: Sampling) -> list[Request]:
    """A request for each sample of each prompt, in that order."""
    return [
        Request(
            index,
            sample,
            request_seed(sampling.seed, prompt.id, sample),
            prompt.ids,
            sampling.temperature if prompt.temperature is None else prompt.temperature,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(sampling.num_samples)
    ]


def generate(
    engine: Engine, model: Model, prompts: Sequence[Prompt], sampling: Sampling, options: EngineOptions
) -> list[Completion]:
    """Sample prompts in one call: a `Completion` for each (prompt, sample), in prompt order then sample order.

    Raises `DataError` for a prompt that cannot be completed, before the engine is started, and `EngineError`.
    """
    check_prompts(prompts, model)
    requests = requests_of(prompts, sampling)
    found = dict(engine.complete(model, requests, sampling, options))
    return [as_completion(model, request, found[place]) for place, request in enumerate(requests)]


def as_completion(model: Model, request: Request, token_ids: list[int]) -> Completion:
    """The completion of an engine's token ids: their text, and whether a stop token ended them."""
    stopped = bool(token_ids) and token_ids[-1] in model.stop_token_ids
    text = _continuation(model.tokenizer, request.prompt_ids, token_ids[:-1] if stopped else token_ids)
    return Completion(
        request.prompt_index,
        request.sample_index,
        request.seed,
        token_ids,
        text,
        "stop" if stopped else "length",
    )


def _continuation(tokenizer: Any, prompt_ids: list[int], token_ids: list[int]) -> str:
    """Decode `token_ids` as they read after the prompt: on their own, many tokenizers drop the first space."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt_ids), decode(prompt_ids + token_ids)
    # A prompt that ends inside a character reads differently once the rest of it follows.
    return whole.removeprefix(before) if whole.startswith(before) else decode(token_ids)
