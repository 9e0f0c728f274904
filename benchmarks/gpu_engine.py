"""The engine on a GPU: attention backends side by side, and against padded scoring and TRL, on a 1B model's shape.

In: a device and a shape; weights are random and lengths are drawn like those of hh-rlhf and of long answers at 2048
tokens. Out: rows of pairs and tokens a second of DPO steps in bfloat16, model FLOPs utilisation, peak memory. Run it
with `benchmarks/gpu.sh`.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import varlen
from benchmarks.gpu_shape import OLMO2_1B, TINY, peak_flops
from benchmarks.gpu_trl import TrlStep
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine import flex_attention, tree_attention
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute

# Median and spread (of the logarithm) of prompt and completion lengths, and the limit.
LENGTHS = {"hh": ((103, 0.9), (35, 0.85), 512), "long answers": ((150, 0.8), (500, 0.6), 2048)}
COMPILED = "flex, compiled layers"
BACKENDS = {
    "flex": flex_attention.NAME,
    COMPILED: flex_attention.NAME,
    "varlen": varlen.NAME,
    "runs": tree_attention.NAME,
}
WAYS = (*BACKENDS, "padded", "padded, presorted", "TRL")
PAIRS, ROUNDS, BUDGET = 64, 5, 16_384
TITLE = "The engine on a GPU"
NOTES = (
    f"An OLMo-2 of 1B shape with random weights, bfloat16 autocast over float32 weights, {PAIRS} pairs a step in packs "
    f"of {BUDGET} tokens; forward and backward of a DPO loss, no optimizer. `padded`: chosen and rejected in rows padded "
    "to the longest of 8 pairs, head on completions only; `presorted`: the pairs sorted by length before. `TRL`: its "
    "trainer's own step on the same ids. Medians of the steps."
)


def unmeasured(why: str) -> list[dict[str, Any]]:
    """The rows without a GPU."""
    return [{"name": f"{data}, {way}", "result": why} for data in LENGTHS for way in WAYS]


def measured(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for every kind of lengths and every way to score."""
    shape, pairs, rounds, shorter = (TINY, 4, 1, 8) if tiny else (OLMO2_1B, PAIRS, ROUNDS, 1)
    # A CPU without bfloat16 products takes a hundred times as long for them.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compute = Compute(device, dtype, BUDGET // shorter)
    for data in LENGTHS:
        rows = draw_rows(data, pairs, shape["vocab_size"], shorter)
        for way in WAYS:
            name = f"{data}, {way}"
            if problem := _problem(way, device):
                yield {"name": name, "result": f"not measured: {problem}"}
                continue
            torch.manual_seed(0)
            with device:
                model = model_of(shape)
            try:
                yield {
                    "name": name,
                    **timed(_step_of(way, model, rows, compute), rows, model, device, rounds),
                }
            except torch.OutOfMemoryError:
                yield {"name": name, "result": "out of memory"}
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _problem(way: str, device: torch.device) -> str:
    if way in ("flex", COMPILED) and device.type == "cpu":
        return "flex_attention has no backward pass on a CPU"
    if way == "TRL" and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    return ""


def model_of(shape: dict[str, int]) -> Any:
    from transformers import AutoModelForCausalLM, Olmo2Config

    return AutoModelForCausalLM.from_config(Olmo2Config(**shape, pad_token_id=0))


def _step_of(way: str, model: Any, rows: RowSet, compute: Compute) -> Callable[[], None]:
    if way == "TRL":
        return TrlStep(model, rows, compute)
    if way not in BACKENDS:
        return partial(padded_step, model, rows, compute, presorted=way != "padded")
    scorer = Scorer(model, replace(compute, compile=way == COMPILED), print, backends=[tree_attention.NAME])
    scorer.way = Way(BACKENDS[way])
    check(scorer, rows)
    return partial(packed_step, scorer, rows)


@torch.no_grad()
def check(scorer: Scorer, rows: RowSet) -> None:
    """Attention run by run, which the tests hold exact, and this backend agree as far as bfloat16 can tell."""
    batch = build_pack(rows, [rows.example_rows(example, mismatched=False) for example in (0, 1, 2)])
    way, found = scorer.way, scorer(batch).completion_logps
    scorer.way = Way(tree_attention.NAME)
    difference = float((found - scorer(batch).completion_logps).abs().max())
    scorer.way = way
    assert difference < 0.2, f"{way.backend} is off by {difference} nats"


def draw_rows(data: str, pairs: int, vocabulary: int, shorter: int = 1) -> RowSet:
    """Pairs of random tokens whose lengths are those of `data`, divided by `shorter`."""
    (prompt, prompt_spread), (completion, completion_spread), limit = LENGTHS[data]
    prompt, completion, limit = prompt / shorter, completion / shorter, limit // shorter
    random = np.random.default_rng(0)

    def draw(median: float, spread: float, most: int) -> np.ndarray:
        length = int(np.clip(random.lognormal(np.log(median), spread), 2, most))
        return random.integers(1, vocabulary, length).astype(np.int32)

    def row(role: str, room: int) -> Row:
        ids = draw(completion, completion_spread, room)
        return Row(role, ids, np.ones(len(ids), bool))

    examples = []
    for number in range(pairs):
        ids = draw(prompt, prompt_spread, limit // 2)
        room = limit - len(ids)
        examples.append(Example(str(number), "drawn", ids, [row("chosen", room), row("rejected", room)]))
    return RowSet([to_table(examples, list(range(pairs)))])


def packed_step(scorer: Scorer, rows: RowSet) -> None:
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    with scorer.weights_cast_once():
        for items in scorer.plan(rows, groups):
            batch = build_pack(rows, [groups[item] for item in items])
            logps = scorer(batch).completion_logps
            owner = batch.token_rows.to(logps.device)
            sums = torch.zeros(len(batch.rows), device=logps.device).index_add(0, owner, logps)
            dpo(sums[0::2], sums[1::2]).backward()
    scorer.zero_grad(set_to_none=True)


def padded_step(
    model: torch.nn.Module, rows: RowSet, compute: Compute, presorted: bool, micro: int = 8
) -> None:
    """Rows of [prompt | completion] padded to the longest of a micro-batch, logits of the completions only."""
    order, device = list(range(rows.num_examples)), compute.device
    if presorted:
        lengths = np.maximum.reduceat(rows.prompt_lengths + rows.completion_lengths, rows.starts)
        order.sort(key=lambda example: lengths[example])
    for begin in range(0, len(order), micro):
        examples = order[begin : begin + micro]
        numbers = [rows.starts[example] + side for side in (0, 1) for example in examples]
        texts = [np.concatenate([rows.prompt(row), rows.completion(row)]) for row in numbers]
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        attended, scored = torch.zeros_like(ids), torch.zeros(len(texts), longest - 1, dtype=torch.bool)
        for place, (row, text) in enumerate(zip(numbers, texts, strict=True)):
            ids[place, : len(text)] = torch.from_numpy(text.astype(np.int64))
            attended[place, : len(text)] = 1
            scored[place, rows.prompt_lengths[row] - 1 : len(text) - 1] = True
        ids, attended, scored = ids.to(device), attended.to(device), scored.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute.dtype == torch.bfloat16):
            hidden = model.get_decoder()(ids, attention_mask=attended, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[:, :-1][scored])
        logps = torch.zeros(scored.shape, device=device)
        logps[scored] = torch.log_softmax(logits.float(), -1).gather(1, ids[:, 1:][scored][:, None])[:, 0]
        sums = logps.sum(1)
        dpo(sums[: len(examples)], sums[len(examples) :]).backward()
    model.zero_grad(set_to_none=True)


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()


def timed(step, rows: RowSet, model: torch.nn.Module, device: torch.device, rounds: int) -> dict[str, Any]:
    """Medians over the rounds after one of warm-up (compilation)."""
    step()
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    completions = int(rows.completion_lengths.sum())
    needed = int(rows.prompt_lengths[rows.starts].sum()) + completions
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - 2 * head
    flops = 6 * (body * needed + head * completions)
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "pairs_per_second": rows.num_examples / median,
        "tokens_per_second": needed / median,
        "mfu": None if peak is None else flops / median / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
