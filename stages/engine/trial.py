"""The true log-probs of a few small rows: each alone through the model's plain eager attention, in float32.

In: a loaded model.  Out: a `Trial`, against which `self_check.py` compares the ways of scoring. A model that is not
causal, or whose log-probs are not finite, is refused here.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache.errors import DataError, UsageError
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packs import Pack, build_pack
from stages.engine.row_lengths import SHORT, with_short_lengths

# Largest difference, in nats a token at float32, between the engine and the model's own log-probs.
SELF_CHECK_TOLERANCE = 1e-3
# The same as a share of what is tested for changes: the log-probs of some models hardly depend on their context.
TOLERATED_SHARE = 0.02
# What rounding alone may make of it.
ROUNDING = 1e-5
# What torch and transformers raise for a model that cannot take a pack, or so short a window.
FAILURES = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Trial:
    """A model, its log-probs of the trial rows, (completion tokens,), and how far from them the engine's may lie."""

    model: Any
    truth: Tensor
    tolerance: float


def run_trial(model: Any, pack: Pack) -> Trial:
    """The truth about the trial rows, each in a forward pass of its own; raises for a model that has none."""
    try:
        model.set_attn_implementation("eager")
        rows = [(torch.cat(tokens), len(tokens[1])) for tokens in pack.row_tokens()]
        logps = [_log_softmax(model, ids) for ids, _ in rows]
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise UsageError(
            f"{type(model).__name__} cannot score a row of token ids ({failure_text(error)}). Use another model."
        ) from error
    truth = torch.cat(
        [_of_completion(found, ids, size) for found, (ids, size) in zip(logps, rows, strict=True)]
    )
    if not truth.isfinite().all():
        raise DataError(
            f"{type(model).__name__} gives log-probs that are not finite{_first_not_finite(model, rows[0][0])}. Its weights "
            f"hold NaN or infinity, or a layer divides by zero; DoRA does on a matrix with rows of zeros: use "
            f"adapter.name=lora there."
        )
    return Trial(model, truth, _tolerance(_effect_of_a_token(model, rows[0][0], logps[0])))


def short_trial(trial: Trial, pack: Pack, only: int | None = None) -> Trial | None:
    """The same for the short model; None where the architecture cannot be made so short."""
    try:
        short = run_trial(with_short_lengths(trial.model, only), pack)
    except UsageError:
        return None
    effect = float((short.truth - trial.truth).abs().max())
    return replace(short, tolerance=min(short.tolerance, _tolerance(effect))) if effect else short


def _effect_of_a_token(model: Any, ids: Tensor, logps: Tensor) -> float:
    """How far another token in the middle of a row moves the log-probs after it; raises if it moves any before it."""
    middle = len(ids) // 2
    other = ids.clone()
    other[middle] = ids[middle - 1] if ids[middle] != ids[middle - 1] else ids[0]
    moved = (_log_softmax(model, other) - logps).nan_to_num().abs().amax(-1)
    before, after = float(moved[:middle].max()), float(moved[middle:].max())
    if before > max(ROUNDING, TOLERATED_SHARE * after):
        hint = " Its config.json says is_decoder: false." if _is_no_decoder(model) else ""
        raise UsageError(
            f"{type(model).__name__} is not causal: another token moves the log-probs before it by up to {before:.3g} nats, "
            f"so it gives completions no probability.{hint} Use a decoder-only model: --set policy.model=NAME"
        )
    return after


def _is_no_decoder(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "is_decoder", True) is False


def _first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """Where they begin: the first module whose output is not finite."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    _log_softmax(model, ids)
    for hook in hooks:
        hook.remove()
    return f", from {found[0]} on" if found else ""


def trial_pack(vocab_size: int) -> Pack:
    """Three small examples of fixed pseudo-random ids; rows of `SHORT` tokens, of one more, and of many more.

    The third goes on from the middle of a completion of the first, and one of its rows ends within another.
    """
    random = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return random.integers(0, vocab_size, length).astype(np.int32)

    prompts = [draw(9), draw(4)]
    completions = [
        [draw(length) for length in lengths] for lengths in ((5, 1, 7), (SHORT + 1 - 4, SHORT - 4))
    ]
    prompts.append(np.concatenate([prompts[0], completions[0][2][:4], draw(2)]))
    completions.append([draw(6), draw(3)])
    completions[2].append(completions[2][0][:4])
    examples = [
        Example(
            str(number), "trial", prompt, [Row("ranked", ids, np.ones(len(ids), bool)) for ids in answers]
        )
        for number, (prompt, answers) in enumerate(zip(prompts, completions, strict=True))
    ]
    rows = RowSet([to_table(examples, [0] * len(examples))])
    return build_pack(
        rows, [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    )


def _log_softmax(model: Any, ids: Tensor) -> Tensor:
    """(tokens, vocabulary), by the model's plain forward pass."""
    return torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1)


def _of_completion(logps: Tensor, ids: Tensor, size: int) -> Tensor:
    return logps[-size - 1 : -1].gather(1, ids[-size:, None])[:, 0]


def _tolerance(effect: float) -> float:
    return min(SELF_CHECK_TOLERANCE, max(ROUNDING, TOLERATED_SHARE * effect))


def failure_text(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
