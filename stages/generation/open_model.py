"""A model folder opened for sampling: its configuration, its tokenizer, the tokens that end a completion."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.errors import DataError
from stages.generation.requests import EngineOptions, Model, Prompt, Sampling
from stages.models.adapters import base_of, is_adapter, require_peft
from stages.models.loading import ModelSource, first_line, has_tokenizer, load_tokenizer, open_config


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


def problem_of(prompt: Prompt, model: Model) -> str | None:
    """Why `model` cannot complete a prompt, or None. One such prompt would abort vLLM's whole call."""
    ids, vocab_size = prompt.ids, model.config.get_text_config().vocab_size
    if not ids:
        return "the prompt is empty; sampling needs at least one token"
    if len(ids) > model.max_length - 1:
        return f"the prompt has {len(ids)} tokens; at most {model.max_length - 1} leave room for a completion in {model.path}"
    if min(ids) < 0 or max(ids) >= vocab_size:
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        return (
            f"token id {outside} is not in the vocabulary of {model.path} ({vocab_size} ids): the prompts were made with "
            f"another tokenizer"
        )
    return None


def check_prompts(prompts: Sequence[Prompt], model: Model) -> None:
    """Raise `DataError` naming the first prompt that `model` cannot complete."""
    for prompt in prompts:
        if problem := problem_of(prompt, model):
            raise DataError(f"Row {prompt.id}: {problem}. Leave it out, or prepare the rows for this model.")
