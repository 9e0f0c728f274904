"""How a model can be scored, found out at load: its log-probs are those of its own forward pass, or it is refused.

In: a `Scorer` around a loaded model.  Out: a `Way`. Two small examples are scored and compared with each row alone
through the model's plain eager attention (`trial.py`). The same is done with a short model, whose windows, chunks and
rotary lengths all lie within these rows: what holds for it holds for rows of any length. Where the log-probs of a row
depend on its length, they are those of a forward pass over the prompt and the whole completion.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cache.errors import UsageError
from stages.engine.checkpointing import disable_checkpointing, enable_checkpointing
from stages.engine.packs import Pack
from stages.engine.row_lengths import special_lengths
from stages.engine.trial import FAILURES, ROUNDING, Trial, failure_text, run_trial, short_trial, trial_pack

# The scorer that is checked. `stages/engine/scorer.py` imports this file, so its type is not imported here.
Scorer = Any

# Of special lengths, those that say how many positions are chosen, by a top-k or by hashes.
SELECTION = re.compile("topk|budget|keep|lsh")


@dataclass(frozen=True)
class Way:
    """How the rows of a model are scored.

    `backend`: the attention function of packs; None: no row is packed. `longest`: tokens of prompt and completion up to
    which a row is packed; None: any. `padded`: whether rows that are not packed share right-padded batches; else each
    has a forward pass of its own. `attention`: transformers' own attention, for rows that are not packed and for
    sampling. `whole`: whether rows alone are fed with their last token too. `checkpoints`: whether log-probs are the
    same under gradient checkpointing.
    """

    backend: str | None = None
    longest: int | None = None
    padded: bool = False
    attention: str = "sdpa"
    whole: bool = False
    checkpoints: bool = True

    def packs(self, pack: Pack) -> np.ndarray:
        """Which rows of a pack are scored together: (rows,) bool."""
        if self.backend is None:
            return np.zeros(len(pack.rows), bool)
        return np.ones(len(pack.rows), bool) if self.longest is None else pack.row_lengths <= self.longest


def choose_way(scorer: Scorer, names: Sequence[str], log: Callable[[str], None]) -> Way:
    """The first backend of `names` that reproduces the model's own log-probs, or none, and for which rows.

    Raises `UsageError` for a model that is not causal or cannot be scored, `DataError` where log-probs are not finite.
    """
    model, problems = scorer.model, []
    _refuse_sparse_blocks(model)
    name_of_model = type(model).__name__
    native = model.config.get_text_config()._attn_implementation
    pack = trial_pack(model.config.get_text_config().vocab_size).to(scorer.compute.device)
    with torch.no_grad():
        trial = run_trial(model, pack)
        lengths = special_lengths(model)
        short = short_trial(trial, pack) if lengths else None
        trials = [trial, short] if short else [trial]
        way = _way_alone(scorer, native, pack, trials, lengths)
        padded = replace(way, padded=True)
        if not way.whole and not any(_problem(scorer, padded, pack, one) for one in trials):
            way = padded
        for name in names:
            packed = replace(way, backend=name)
            problems.append(_problem(scorer, packed, pack, trial))
            if not problems[-1]:
                way = replace(packed, longest=_longest(scorer, packed, pack, trial, short, lengths))
                break
    unpacked = "in right-padded batches" if way.padded else "one completion at a time"
    if way.backend is None:
        log(f"{name_of_model} is scored {unpacked} (slower): {problems[-1]}.")
    elif problems[0]:
        log(f"{name_of_model} attends by {way.backend}: {problems[0]} with {names[0]}.")
    if way.longest is not None:
        log(
            f"{name_of_model} packs rows of up to {way.longest:,} tokens, longer ones are scored {unpacked} (slower): "
            f"beyond that length a pack does not reproduce its own log-probs."
        )
    return way


def can_checkpoint(scorer: Scorer, log: Callable[[str], None]) -> bool:
    """Whether the model's layers can be checkpointed without noise: the same log-probs twice, and those without.

    To the bit on a CPU, but for rounding on a GPU, where sums over experts have no fixed order.
    """
    model = scorer.model
    pack = trial_pack(model.config.get_text_config().vocab_size)
    with torch.no_grad(), _scoring(scorer, model, scorer.way):
        expected = scorer(pack).completion_logps
        try:
            enable_checkpointing(model)
            found = [scorer(pack).completion_logps for _ in range(2)]
        except ValueError as error:
            log(f"Gradient checkpointing is off: {failure_text(error)}")
            return False
        finally:
            disable_checkpointing(model)
    noise = max(float((logps - expected).abs().max()) for logps in found)
    if noise <= (0.0 if expected.device.type == "cpu" else ROUNDING):
        return True
    log(
        f"Gradient checkpointing is off: {type(model).__name__} draws random numbers under it, "
        f"which moves log-probs by up to {noise:.3g} nats."
    )
    return False


def _refuse_sparse_blocks(model: Any) -> None:
    """BigBird's sparse blocks see later tokens, and only in rows longer than any that is tried here."""
    if any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
        raise UsageError(
            f"{type(model).__name__} attends to sparse blocks, which is not causal. If it was trained as a decoder, "
            f"write attention_type: original_full into its config.json; else use a decoder-only model."
        )


def _way_alone(
    scorer: Scorer, native: str, pack: Pack, trials: Sequence[Trial], lengths: Iterable[str]
) -> Way:
    """How rows are scored in forward passes of their own."""
    # Which of equal positions are chosen depends on how many there are.
    feeds = (True,) if any(SELECTION.search(name) for name in lengths) else (False, True)
    ways = [Way(attention=name, whole=whole) for name in dict.fromkeys((native, "eager")) for whole in feeds]
    problems: list[str] = []
    for way in ways:
        problems = [_problem(scorer, way, pack, trial) for trial in trials]
        if not any(problems):
            return way
    raise UsageError(
        f"{type(scorer.model).__name__} does not give the same row the same log-probs twice: {max(problems)}. "
        f"It cannot be scored; use another model."
    )


def _problem(scorer: Scorer, way: Way, pack: Pack, trial: Trial) -> str:
    """Why the trial model cannot be scored in this way, or an empty string."""
    if (way.backend or way.padded) and type(trial.model.get_output_embeddings()) is not nn.Linear:
        return "its output layer is not a plain linear layer"
    try:
        with _scoring(scorer, trial.model, way):
            found = scorer(pack).completion_logps
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"packed scoring fails with {failure_text(error)}"
    difference = float((found - trial.truth).abs().max())
    if not difference <= trial.tolerance:
        return f"packed log-probs differ from its own by {difference:.3g} nats"
    return ""


def _longest(
    scorer: Scorer, way: Way, pack: Pack, trial: Trial, short: Trial | None, lengths: dict[str, int]
) -> int | None:
    """Up to which length rows can be packed: to the first beyond which the short model cannot."""
    if not lengths or (short and not _problem(scorer, way, pack, short)):
        return None
    lost = []
    for length in sorted(set(lengths.values())):
        one_short = short_trial(trial, pack, only=length)
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
