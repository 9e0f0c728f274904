"""Completions sampled during training, so that a degenerate policy is seen early.

In: a pool of prompts and sampling settings.  Out: records for `samples.jsonl`, and the metrics `samples/...`. The prompts
of a step are a function of the step alone, and each completion has its own seed, so a resumed run samples the same as
an uninterrupted one. The random state of training is not used.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from cache.fingerprint import fingerprint
from stages.data.messages import Message
from stages.generation.completion_files import instruction
from stages.generation.generate import Completion, as_completion, request_seed
from stages.generation.open_model import check_prompts, open_model
from stages.generation.requests import EngineOptions, Prompt, Request, Sampling
from stages.generation.transformers_engine import sample_network
from stages.models.loading import ModelSource
from stages.settings.train import SampleStrategy

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

GRAM = 4  # tokens


@dataclass(frozen=True)
class SampleRecord:
    """One sampled completion: a line of `samples.jsonl`."""

    step: int
    id: str
    prompt: str
    completion: str
    finish_reason: str
    num_tokens: int
    score: float | None = None


@dataclass(frozen=True)
class PromptPool:
    """Prompts, the number of prompts sampled each time, the strategy that chooses them, and sampling settings.

    `score` gives a completion of a prompt a score, `judge` identifies it; both None without one.
    """

    prompts: Sequence[Prompt]
    number: int
    strategy: SampleStrategy
    sampling: Sampling
    score: Callable[[str | list[Message], str], float] | None = None
    judge: str | None = None

    @property
    def identity(self) -> str:
        """Digest of all that changes the samples, except the weights."""
        number = min(self.number, len(self.prompts))
        used = self.prompts[:number] if self.strategy == "fixed" else self.prompts
        prompts = [[prompt.id, prompt.ids] for prompt in used]
        sampling = asdict(replace(self.sampling.effective, num_samples=1))  # while training, always one
        how = {"sampling": sampling, "number": number, "strategy": self.strategy}
        judged = {} if self.judge is None else {"judge": self.judge}
        return fingerprint({"prompts": prompts, **how, **judged})


def choose(strategy: SampleStrategy, pool: int, number: int, round_index: int, seed: int) -> list[int]:
    """Distinct places in a pool of `pool` prompts. `round_index` counts the rounds of sampling, 0 before training.

    `fixed`: always the first `number`; `round_robin`: the next `number`, cyclically; `random`: drawn from
    (seed, round_index).
    """
    number = min(number, pool)
    if strategy == "fixed":
        return list(range(number))
    if strategy == "round_robin":
        return [(round_index * number + place) % pool for place in range(number)]
    return random.Random(f"{seed} {round_index}").sample(range(pool), number)


def sample_policy(
    scorer: "Scorer",
    source: ModelSource,
    pool: PromptPool,
    step: int,
    round_index: int,
    synced_ranks: bool = False,
) -> tuple[list[SampleRecord], dict[str, float]]:
    """Records of the completions of this step, and their metrics. Every rank calls this and gets the same.

    `synced_ranks` is for a sharded model, each of whose forward passes takes all ranks. Raises `DataError` for a prompt
    that leaves no room for a completion.
    """
    sampling = pool.sampling
    places = choose(pool.strategy, len(pool.prompts), pool.number, round_index, sampling.seed)
    prompts = [pool.prompts[place] for place in places]
    longest = max(len(prompt.ids) for prompt in pool.prompts) + sampling.max_tokens
    options = EngineOptions("float32", longest, trust_remote_code=source.runs_code)
    model = open_model(source.folder, sampling, options)
    check_prompts(pool.prompts, model)
    requests = [
        Request(
            index, 0, request_seed(sampling.seed, f"{prompt.id} {step}", 0), prompt.ids, sampling.temperature
        )
        for index, prompt in enumerate(prompts)
    ]
    found = scorer.in_generation_mode(
        lambda network: sorted(sample_network(network, model, requests, sampling, synced_ranks))
    )
    sampled, is_finite = [ids for _, ids, _ in found], [finite for _, _, finite in found]
    completions = [as_completion(model, *pair) for pair in zip(requests, sampled, strict=True)]
    records = [_record(step, *pair, pool) for pair in zip(prompts, completions, strict=True)]
    return records, sample_metrics(records, sampled, is_finite)


def _record(step: int, prompt: Prompt, completion: Completion, pool: PromptPool) -> SampleRecord:
    return SampleRecord(
        step=step,
        id=prompt.id,
        prompt=instruction(prompt.content),
        completion=completion.text,
        finish_reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
        score=None if pool.score is None else pool.score(prompt.content, completion.text),
    )


def sample_metrics(
    records: Sequence[SampleRecord], token_ids: Sequence[Sequence[int]], is_finite: Sequence[bool]
) -> dict[str, float]:
    """`samples/...`: mean length in tokens, mean score; shares of empty completions, repeated 4-grams, non-finite logits."""
    scores = [record.score for record in records if record.score is not None]
    return {
        **({"samples/score": fmean(scores)} if scores else {}),
        "samples/mean_tokens": fmean(record.num_tokens for record in records),
        "samples/empty_share": fmean(not record.completion.strip() for record in records),
        "samples/repetition_share": fmean(map(repetition, token_ids)),
        "samples/nonfinite_share": fmean(not finite for finite in is_finite),
    }


def repetition(ids: Sequence[int]) -> float:
    """Share of the token 4-grams that occurred before in the same completion; 0 if it has none."""
    grams = [tuple(ids[place : place + GRAM]) for place in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def console_lines(records: Sequence[SampleRecord], characters: int = 160) -> list[str]:
    """One line per record for the console; texts longer than `characters` are cut."""

    def cut(text: str) -> str:
        flat = " ".join(text.split())
        return flat if len(flat) <= characters else flat[: characters - 3] + "..."

    return [f"  [{cut(record.prompt)}] {cut(record.completion)}" for record in records]
