"""The engine for machines without vLLM: `model.generate` with a seed of its own for every request.

In:  a model folder and requests (prompt ids, seed).  Out: the token ids of each completion.

A completion must not depend on the other rows of its batch. Seeds are not enough for that: the shape of
a matrix product decides how it rounds. With batches padded to their longest prompt, 4 of 15 bfloat16
completions of 24 tokens changed with the other rows of the batch. So every batch has NUM_ROWS rows and is
padded to a width that depends on the request alone; a batch that is not full is filled up with copies
of its first request. Then the shapes of a request are the same in every batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.generation.contract import EngineName
from stages.generation.requests import EngineOptions, Model, Request, Sampling
from stages.models.adapters import load_adapter
from stages.models.loading import ModelSource, load_weights

if TYPE_CHECKING:
    import torch

NUM_ROWS = 16
WIDTH_STEP = 32


class TransformersEngine:
    """Generates in this process, with one model loaded at a time."""

    name: EngineName = "transformers"

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._loaded: tuple[Path, Path | None] | None = None
        self._network: Any = None

    def __enter__(self) -> "TransformersEngine":
        """Nothing to start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the memory of the model."""
        self._release()

    def complete(
        self, model: Model, requests: Sequence[Request], sampling: Sampling, options: EngineOptions
    ) -> Iterator[tuple[int, list[int]]]:
        """As `Engine.complete`."""
        if self._loaded != (model.path, model.adapter):
            self._release()
            self._network = _load(model, options)
            self._loaded = (model.path, model.adapter)
        for place, ids, _ in sample_network(self._network, model, requests, sampling):
            yield place, ids

    def _release(self) -> None:
        import torch

        self._loaded = self._network = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load(model: Model, options: EngineOptions) -> Any:
    import torch

    source = ModelSource(str(model.path), model.path, runs_code=options.trust_remote_code)
    network = load_weights(source, getattr(torch, options.dtype))
    if model.adapter is not None:
        network = load_adapter(network, model.adapter)
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def sample_network(
    network: Any, model: Model, requests: Sequence[Request], sampling: Sampling, in_step: bool = False
) -> Iterator[tuple[int, list[int], bool]]:
    """Yield the place of each request, its token ids, and whether all its scores were finite, a batch at a time.

    `in_step`: all ranks sample the same requests, and none stops before the others.
    """
    groups: dict[tuple[int, int, float], list[int]] = {}
    for index, request in enumerate(requests):
        shape = _shape(len(request.prompt_ids), model.max_length, sampling.max_tokens)
        groups.setdefault((*shape, request.temperature), []).append(index)
    for (width, budget, temperature), members in sorted(groups.items()):
        how = replace(sampling, temperature=temperature)
        for start in range(0, len(members), NUM_ROWS):
            batch = members[start : start + NUM_ROWS]
            full = [requests[index] for index in batch + batch[:1] * (NUM_ROWS - len(batch))]
            watch = FiniteScores(len(full))
            sampled = _sample_batch(network, full, width, budget, model.stop_token_ids, how, watch, in_step)
            yield from zip(batch, sampled, watch.finite, strict=False)


def _shape(prompt_length: int, max_length: int, max_tokens: int) -> tuple[int, int]:
    """Width of the padded prompt and number of new tokens, both in tokens.

    The width is always more than the prompt, because without any padding transformers drops the mask
    and takes another attention kernel.
    """
    width = (prompt_length // WIDTH_STEP + 1) * WIDTH_STEP
    return width, min(max_tokens, max_length - prompt_length)


def _sample_batch(
    network: Any,
    requests: list[Request],
    width: int,
    budget: int,
    stop: list[int],
    sampling: Sampling,
    watch: "FiniteScores",
    in_step: bool,
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    ids = torch.zeros((len(requests), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    # With do_sample off, `generate` takes the largest score; with `SeededNoise` that is a sample.
    config = GenerationConfig(
        max_new_tokens=budget, do_sample=False, eos_token_id=stop or None, pad_token_id=0
    )
    noise = (
        [] if sampling.temperature == 0 else [SeededNoise([request.seed for request in requests], sampling)]
    )
    # `generate` takes what its argument leaves open from here, such as the model's own temperature or penalties.
    own_config, network.generation_config = network.generation_config, GenerationConfig()
    try:
        with (
            torch.no_grad()
        ):  # not inference_mode: tensors that a forward leaves in the model may be trained on
            whole = network.generate(
                ids.to(network.device),
                attention_mask=mask.to(network.device),
                generation_config=config,
                logits_processor=[watch, *noise],
                synced_gpus=in_step,
            )
    finally:
        network.generation_config = own_config
    return [_up_to_stop(row, stop) for row in whole[:, width:].tolist()]


def _up_to_stop(ids: list[int], stop: list[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stop), len(ids))
    return ids[: end + 1]


class FiniteScores:
    """A logits processor that changes nothing and records which rows had a NaN or infinite score."""

    def __init__(self, rows: int) -> None:
        """Begin with all rows finite."""
        self.finite = [True] * rows

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """The same scores (row, vocab)."""
        now = scores.isfinite().all(dim=-1).tolist()
        self.finite = [before and row for before, row in zip(self.finite, now, strict=True)]
        return scores


class SeededNoise:
    """A logits processor whose scores have a sample as their maximum: probabilities over exponential noise.

    Each row has a generator of its own. The argmax of p / Exp(1) is distributed as p (the Gumbel trick, as vLLM samples on a GPU). The noise
    is drawn on the CPU, so that a seed means the same on every device.
    """

    def __init__(self, seeds: list[int], sampling: Sampling) -> None:
        """One generator for each row of the batch."""
        import torch

        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Noisy scores (row, vocab) from logits (row, vocab)."""
        import torch

        logits = scores.float() / self.sampling.temperature
        probabilities = keep_likeliest(logits, self.sampling.top_k, self.sampling.top_p).softmax(dim=-1)
        noise = torch.empty(probabilities.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return probabilities / noise.to(probabilities.device)


def keep_likeliest(logits: "torch.Tensor", top_k: int, top_p: float) -> "torch.Tensor":
    """Set all but the most likely logits (row, vocab) to -inf, by vLLM's rules.

    top_k comes first, and ties with the k-th logit stay; then the fewest tokens whose probability
    reaches top_p, never less than one.
    """
    if top_k == 0 and top_p == 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    if 0 < top_k < logits.shape[-1]:
        ascending = ascending.masked_fill(ascending < ascending[:, -top_k, None], float("-inf"))
    if top_p < 1:
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[:, -1] = False
        ascending = ascending.masked_fill(dropped, float("-inf"))
    return logits.scatter(-1, order, ascending)
