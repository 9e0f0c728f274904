"""Cutting an example to the length limits, in tokens, with one prompt for all its completions.

1. `max_prompt_length`: the prompt keeps its end (keep_end) or its start (keep_start).
2. `max_completion_length`: each completion keeps its start.
3. `max_length`, prompt and completion together: keep_end cuts the prompt from its left, and a
   completion only once one prompt token is left; keep_start keeps the prompt and cuts completions.
"""

from dataclasses import dataclass

import numpy as np

from stages.settings.data import PrepareSettings


@dataclass(frozen=True)
class Truncated:
    """Prompt (int32) and `(ids, mask)` completions within the limits, and how many tokens were cut from each."""

    prompt_ids: np.ndarray
    completions: list[tuple[np.ndarray, np.ndarray]]
    prompt_cut: int
    completions_cut: list[int]


def truncate(
    prompt_ids: np.ndarray, completions: list[tuple[np.ndarray, np.ndarray]], limits: PrepareSettings
) -> Truncated | None:
    """Cut an example to `limits`; None when the prompt that keep_start keeps leaves no room for a completion."""
    prompt = prompt_ids
    if limits.max_prompt_length is not None and len(prompt) > limits.max_prompt_length:
        prompt = _shorten(prompt, limits.max_prompt_length, limits.truncation_mode)
    room = limits.max_completion_length or limits.max_length
    longest = max((min(len(ids), room) for ids, _ in completions), default=0)
    if limits.truncation_mode == "keep_end":
        prompt = prompt[len(prompt) - max(1, min(len(prompt), limits.max_length - longest)) :]
    room = min(room, limits.max_length - len(prompt))
    if room < 1:
        return None
    kept = [(ids[:room], mask[:room]) for ids, mask in completions]
    cut = [len(ids) - len(short) for (ids, _), (short, _) in zip(completions, kept, strict=True)]
    return Truncated(prompt, kept, len(prompt_ids) - len(prompt), cut)


def _shorten(prompt: np.ndarray, length: int, mode: str) -> np.ndarray:
    return prompt[len(prompt) - length :] if mode == "keep_end" else prompt[:length]
