"""Completions of the policy while it is trained: to read along, and to see at once when it degenerates.

In: a pool of prompts and how to sample.  Out: records for `samples.jsonl`, and the metrics `samples/...`. Which
prompts a step takes is a function of the step alone, and each completion has a seed of its own, so a resumed
run samples what the uninterrupted one did; training's random state is not touched.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cache.fingerprint import fingerprint
from stages.generation.completion_files import instruction
from stages.generation.generate import as_completion, check_prompts, open_model, request_seed
from stages.generation.requests import EngineOptions, Request, Sampling
from stages.generation.transformers_engine import sample_network
from stages.models.loading import ModelSource
from stages.settings.train import SampleStrategy

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer
    from stages.sample.stage import Prompt

GRAM = 4  # tokens


@dataclass(frozen=True)
class PromptPool:
    """Prompts, how many of them a step takes and by which strategy, and how completions are sampled."""

    prompts: Sequence["Prompt"]
    number: int
    strategy: SampleStrategy
    sampling: Sampling

    @property
    def identity(self) -> str:
        """Digest of everything that changes the samples of given weights."""
        prompts = [[prompt.id, prompt.ids] for prompt in self.prompts]
        how = {"sampling": asdict(self.sampling), "number": self.number, "strategy": self.strategy}
        return fingerprint({"prompts": prompts, **how})


def choose(strategy: SampleStrategy, pool: int, number: int, occasion: int, seed: int) -> list[int]:
    """Places in the pool that the n-th sampling takes (0: before training): pure, each place at most once.

    `fixed`: always the first; `round_robin`: the next ones, beginning anew at the end; `random`: drawn from
    (seed, occasion).
    """
    number = min(number, pool)
    if strategy == "fixed":
        return list(range(number))
    if strategy == "round_robin":
        return [(occasion * number + place) % pool for place in range(number)]
    return random.Random(f"{seed} {occasion}").sample(range(pool), number)


def sample_policy(
    scorer: "Scorer", source: ModelSource, pool: PromptPool, step: int, occasion: int, in_step: bool = False
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Records of the completions of this step, and their metrics. All ranks call and get the same.

    `in_step` is for ranks that share one sharded model: each of its forward passes needs all of them. Raises
    `DataError` naming a prompt of the pool that leaves no room for a completion.
    """
    sampling = pool.sampling
    places = choose(pool.strategy, len(pool.prompts), pool.number, occasion, sampling.seed)
    prompts = [pool.prompts[place] for place in places]
    longest = max(len(prompt.ids) for prompt in pool.prompts) + sampling.max_tokens
    model = open_model(source.folder, sampling, EngineOptions("float32", longest))
    check_prompts([prompt.ids for prompt in pool.prompts], [prompt.id for prompt in pool.prompts], model)
    requests = [
        Request(index, 0, request_seed(sampling.seed, f"{prompt.id} {step}", 0), prompt.ids)
        for index, prompt in enumerate(prompts)
    ]
    sampled, is_finite = scorer.in_generation_mode(
        lambda network: sample_network(network, model, requests, sampling, in_step)
    )
    completions = [as_completion(model, *pair) for pair in zip(requests, sampled, strict=True)]
    records = [
        {
            "step": step,
            "id": prompt.id,
            "prompt": instruction(prompt.shown),
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return records, sample_metrics(records, sampled, is_finite)


def sample_metrics(
    records: Sequence[Mapping[str, Any]], token_ids: Sequence[Sequence[int]], is_finite: Sequence[bool]
) -> dict[str, float]:
    """`samples/...`: mean length in tokens, shares of empty ones and of repeated 4-grams, of non-finite scores."""
    return {
        "samples/mean_tokens": fmean(record["num_tokens"] for record in records),
        "samples/empty_share": fmean(not record["completion"].strip() for record in records),
        "samples/repetition_share": fmean(map(repetition, token_ids)),
        "samples/nonfinite_share": fmean(not finite for finite in is_finite),
    }


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams of token ids that occurred before in the same completion; 0 for one too short."""
    grams = [tuple(ids[place : place + GRAM]) for place in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def shown(records: Sequence[Mapping[str, Any]], characters: int = 160) -> list[str]:
    """One line a record for the console, long texts cut."""

    def cut(text: str) -> str:
        flat = " ".join(text.split())
        return flat if len(flat) <= characters else flat[: characters - 3] + "..."

    return [f"  [{cut(record['prompt'])}] {cut(record['completion'])}" for record in records]
