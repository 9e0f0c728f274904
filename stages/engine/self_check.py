"""How a model can be scored, found out at load: its log-probs are those of its own forward pass, or it is refused.

In: a `Scorer` around a loaded model.  Out: a `Way`. Two small examples are scored, and the truth is each row alone
through the model's plain eager attention, in float32. A short model, whose windows, chunks and rotary lengths all
lie within these rows, is asked the same: what holds for it holds for rows of any length. What a row's log-probs are,
where they depend on its length: those of a forward pass over the prompt and the whole completion.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache.errors import DataError, UsageError
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.checkpointing import disable_checkpointing, enable_checkpointing
from stages.engine.packs import Pack, build_pack
from stages.engine.row_lengths import SHORT, special_lengths, with_short_lengths

# The scorer that is checked. `stages/engine/scorer.py` imports this file, so its type is not imported here.
Scorer = Any

# Largest difference, in nats a token at float32, between the engine and the model's own log-probs.
SELF_CHECK_TOLERANCE = 1e-3
# The same as a share of what is tested for changes: the log-probs of some models hardly depend on their context.
TOLERATED_SHARE = 0.02
# What rounding alone may make of it.
ROUNDING = 1e-5
# Of special lengths, those that say how many positions are chosen, by a top-k or by hashes.
SELECTION = re.compile("topk|budget|keep|lsh")
# What torch and transformers raise for a model that cannot take a pack, or so short a window.
FAILURES = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Way:
    """How the rows of a model are scored.

    `backend`: the attention function of packs; None: every row has a forward pass of its own. `longest`: tokens of
    prompt and completion up to which a row is packed; None: any. `attention`: transformers' own attention, for rows
    that are not packed and for sampling. `whole`: whether such rows are fed with their last token too. `checkpoints`:
    whether log-probs are the same under gradient checkpointing.
    """

    backend: str | None = None
    longest: int | None = None
    attention: str = "sdpa"
    whole: bool = False
    checkpoints: bool = True

    def packs(self, pack: Pack) -> np.ndarray:
        """Which rows of a pack are scored together: (rows,) bool."""
        if self.backend is None:
            return np.zeros(len(pack.rows), bool)
        return np.ones(len(pack.rows), bool) if self.longest is None else pack.row_lengths <= self.longest


@dataclass(frozen=True)
class _Trial:
    """A model, its log-probs of the trial rows, (completion tokens,), and how far from them the engine's may lie."""

    model: Any
    truth: Tensor
    tolerance: float


def choose_way(scorer: Scorer, names: Sequence[str], say: Callable[[str], None]) -> Way:
    """The first backend of `names` that reproduces the model's own log-probs, or none, and for which rows.

    Raises `UsageError` for a model that is not causal or cannot be scored, `DataError` where log-probs are not finite.
    """
    model, problems = scorer.model, []
    _refuse_sparse_blocks(model)
    name_of_model = type(model).__name__
    native = model.config.get_text_config()._attn_implementation
    pack = _trial_pack(model.config.get_text_config().vocab_size).to(scorer.compute.device)
    with torch.no_grad():
        trial = _trial(model, pack)
        lengths = special_lengths(model)
        short = _short_trial(trial, pack) if lengths else None
        way = _way_alone(scorer, native, pack, [trial, short] if short else [trial], lengths)
        for name in names:
            packed = replace(way, backend=name)
            problems.append(_problem(scorer, packed, pack, trial))
            if not problems[-1]:
                way = replace(packed, longest=_longest(scorer, packed, pack, trial, short, lengths))
                break
    if way.backend is None:
        say(f"{name_of_model} is scored one completion at a time (slower): {problems[-1]}.")
    elif problems[0]:
        say(f"{name_of_model} attends by {way.backend}: {problems[0]} with {names[0]}.")
    if way.longest is not None:
        say(
            f"{name_of_model} packs rows of up to {way.longest:,} tokens, longer ones are scored one at a time (slower): "
            f"beyond that length a pack does not reproduce its own log-probs."
        )
    return way


def can_checkpoint(scorer: Scorer, say: Callable[[str], None]) -> bool:
    """Whether the model's layers can be checkpointed without noise: the same log-probs twice, and those without.

    To the bit on a CPU, but for rounding on a GPU, where sums over experts have no fixed order.
    """
    model = scorer.model
    pack = _trial_pack(model.config.get_text_config().vocab_size)
    with torch.no_grad(), _scoring(scorer, model, scorer.way):
        expected = scorer(pack).completion_logps
        try:
            enable_checkpointing(model)
            found = [scorer(pack).completion_logps for _ in range(2)]
        except ValueError as error:
            say(f"Gradient checkpointing is off: {_said(error)}")
            return False
        finally:
            disable_checkpointing(model)
    noise = max(float((logps - expected).abs().max()) for logps in found)
    if noise <= (0.0 if expected.device.type == "cpu" else ROUNDING):
        return True
    say(
        f"Gradient checkpointing is off: {type(model).__name__} draws random numbers under it, "
        f"which moves log-probs by up to {noise:.3g} nats."
    )
    return False


def _trial(model: Any, pack: Pack) -> _Trial:
    """The truth about the trial rows, each in a forward pass of its own; raises for a model that has none."""
    try:
        model.set_attn_implementation("eager")
        rows = _rows(pack)
        logps = [_log_softmax(model, ids) for ids, _ in rows]
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise UsageError(
            f"{type(model).__name__} cannot score a row of token ids ({_said(error)}). Use another model."
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
    return _Trial(model, truth, _tolerance(_effect_of_a_token(model, rows[0][0], logps[0])))


def _short_trial(trial: _Trial, pack: Pack, only: int | None = None) -> _Trial | None:
    """The same for the short model; None where the architecture cannot be made so short."""
    try:
        short = _trial(with_short_lengths(trial.model, only), pack)
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


def _refuse_sparse_blocks(model: Any) -> None:
    """BigBird's sparse blocks see later tokens, and only in rows longer than any that is tried here."""
    if any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
        raise UsageError(
            f"{type(model).__name__} attends to sparse blocks, which is not causal. If it was trained as a decoder, "
            f"write attention_type: original_full into its config.json; else use a decoder-only model."
        )


def _way_alone(
    scorer: Scorer, native: str, pack: Pack, trials: Sequence[_Trial], lengths: Iterable[str]
) -> Way:
    """How rows are scored in forward passes of their own."""
    # Which of equal positions are chosen depends on how many there are.
    feeds = (True,) if any(SELECTION.search(name) for name in lengths) else (False, True)
    ways = [Way(None, None, name, whole) for name in dict.fromkeys((native, "eager")) for whole in feeds]
    problems: list[str] = []
    for way in ways:
        problems = [_problem(scorer, way, pack, trial) for trial in trials]
        if not any(problems):
            return way
    raise UsageError(
        f"{type(scorer.model).__name__} does not give the same row the same log-probs twice: {max(problems)}. "
        f"It cannot be scored; use another model."
    )


def _problem(scorer: Scorer, way: Way, pack: Pack, trial: _Trial) -> str:
    """Why the trial model cannot be scored in this way, or an empty string."""
    if way.backend and type(trial.model.get_output_embeddings()) is not nn.Linear:
        return "its output layer is not a plain linear layer"
    try:
        with _scoring(scorer, trial.model, way):
            found = scorer(pack).completion_logps
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"packed scoring fails with {_said(error)}"
    difference = float((found - trial.truth).abs().max())
    if not difference <= trial.tolerance:
        return f"packed log-probs differ from its own by {difference:.3g} nats"
    return ""


def _longest(
    scorer: Scorer, way: Way, pack: Pack, trial: _Trial, short: _Trial | None, lengths: dict[str, int]
) -> int | None:
    """Up to which length rows can be packed: to the first beyond which the short model cannot."""
    if not lengths or (short and not _problem(scorer, way, pack, short)):
        return None
    lost = []
    for length in sorted(set(lengths.values())):
        one_short = _short_trial(trial, pack, only=length)
        if one_short is None or _problem(scorer, way, pack, one_short):
            lost.append(length)
    return min(lost or lengths.values())


@contextmanager
def _scoring(scorer: Scorer, model: Any, way: Way) -> Iterator[None]:
    """Within it the scorer scores another model another way, in float32, and counts no forward passes."""
    kept = {name: getattr(scorer, name) for name in ("model", "way", "compute", "forwards")}
    scorer.model, scorer.way, scorer.compute = model, way, replace(scorer.compute, dtype=torch.float32)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(scorer, name, value)


def _rows(pack: Pack) -> list[tuple[Tensor, int]]:
    """Token ids of each row of a pack, prompt and whole completion, and how many are the completion's."""
    found, cursor = [], 0
    for segment in pack.segments:
        prompt = pack.input_ids[0, segment.start : segment.start + segment.prompt_length]
        for fed in segment.completion_lengths:
            found.append((torch.cat([prompt, pack.targets[cursor : cursor + fed + 1]]), fed + 1))
            cursor += fed + 1
    return found


def _log_softmax(model: Any, ids: Tensor) -> Tensor:
    """(tokens, vocabulary), by the model's plain forward pass."""
    return torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1)


def _of_completion(logps: Tensor, ids: Tensor, size: int) -> Tensor:
    return logps[-size - 1 : -1].gather(1, ids[-size:, None])[:, 0]


def _tolerance(effect: float) -> float:
    return min(SELF_CHECK_TOLERANCE, max(ROUNDING, TOLERATED_SHARE * effect))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


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


def _trial_pack(vocab_size: int) -> Pack:
    """Two small examples of fixed pseudo-random ids; rows of `SHORT` tokens, of one more, and of many more."""
    random = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return random.integers(0, vocab_size, length).astype(np.int32)

    examples = [
        Example(
            str(number),
            "trial",
            draw(prompt),
            [Row("ranked", draw(length), np.ones(length, bool)) for length in lengths],
        )
        for number, (prompt, lengths) in enumerate([(9, (5, 1, 7)), (4, (SHORT + 1 - 4, SHORT - 4))])
    ]
    rows = RowSet([to_table(examples, [0, 0])])
    return build_pack(
        rows, [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    )
