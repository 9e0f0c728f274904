"""The engine on a GPU: attention backends side by side, and against padded scoring, on a 1B model's shape.

In: nothing; weights are random and lengths are drawn like those of hh-rlhf and of long answers at 2048 tokens.
Out: `results/gpu.json` and `.md`: pairs and tokens a second of DPO steps in bfloat16, model FLOPs utilisation,
peak memory. Where there is no CUDA device the rows say so. `--smoke` runs the same code on a tiny model here.

    python benchmarks/gpu_engine.py [--smoke]
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks import varlen
from benchmarks.gpu_shape import OLMO2_1B, TINY, peak_flops
from benchmarks.record import write_results
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine import flex_attention, tree_attention
from stages.engine.packing import pack_lengths
from stages.engine.packs import build_pack, packed_length
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute

# Median and spread (of the logarithm) of prompt and completion lengths, and the limit.
LENGTHS = {"hh": ((103, 0.9), (35, 0.85), 512), "long answers": ((150, 0.8), (500, 0.6), 2048)}
WAYS = {
    "flex": flex_attention.NAME,
    "varlen": varlen.NAME,
    "segments": tree_attention.NAME,
    "padded": None,
}
PAIRS, ROUNDS, BUDGET = 64, 5, 16_384


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--smoke", action="store_true", help="a tiny model on this machine; writes nothing")
    smoke = options.parse_args().smoke
    if smoke:
        for row in campaign(torch.device("cpu"), TINY, pairs=4, rounds=1, budget=2048):
            print(row)
        return
    names = [f"{data}, {way}" for data in LENGTHS for way in WAYS]
    rows: list[dict[str, Any]] = [{"name": name, "result": "not measured: no CUDA device"} for name in names]
    device = "no CUDA device"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        rows = list(campaign(torch.device("cuda"), OLMO2_1B, PAIRS, ROUNDS, BUDGET))
    notes = (
        f"{device}. An OLMo-2 of 1B shape with random weights, bfloat16 autocast over float32 weights, {PAIRS} pairs a step "
        f"in packs of {BUDGET} tokens; forward and backward of a DPO loss, no optimizer. `padded`: chosen and rejected in "
        "rows padded to the longest, head on completions only. Medians of the steps."
    )
    write_results("gpu", rows, "The engine on a GPU", notes)


def campaign(device: torch.device, shape: dict[str, int], pairs: int, rounds: int, budget: int):
    """A row for every kind of lengths and every way to score."""
    from transformers import AutoModelForCausalLM, Olmo2Config

    for data in LENGTHS:
        rows = draw_rows(data, pairs, shape["vocab_size"])
        for way, backend in WAYS.items():
            if way == "flex" and device.type == "cpu":
                continue  # no backward pass there
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(Olmo2Config(**shape, pad_token_id=0)).to(device)
            compute = Compute(device, torch.bfloat16, budget)
            if backend is None:
                step = partial(padded_step, model, rows, device)
            else:
                scorer = Scorer(model, compute, print, backends=[tree_attention.NAME])
                scorer.way = Way(backend)
                check(scorer, rows)
                step = partial(packed_step, scorer, rows)
            yield {"name": f"{data}, {way}", **timed(step, rows, model, device, rounds)}
            del step, model


@torch.no_grad()
def check(scorer: Scorer, rows: RowSet) -> None:
    """Segment attention, which the tests hold exact, and this backend agree as far as bfloat16 can tell."""
    batch = build_pack(rows, [rows.example_rows(example, mismatched=False) for example in (0, 1, 2)])
    way, found = scorer.way, scorer(batch).completion_logps
    scorer.way = Way(tree_attention.NAME)
    difference = float((found - scorer(batch).completion_logps).abs().max())
    scorer.way = way
    assert difference < 0.2, f"{way.backend} is off by {difference} nats"


def draw_rows(data: str, pairs: int, vocabulary: int) -> RowSet:
    (prompt, prompt_spread), (completion, completion_spread), limit = LENGTHS[data]
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
    lengths = [packed_length(rows, group) for group in groups]
    with scorer.weights_cast_once():
        for items in pack_lengths(lengths, scorer.compute.tokens_per_batch):
            batch = build_pack(rows, [groups[item] for item in items])
            logps = scorer(batch).completion_logps
            owner = batch.token_rows.to(logps.device)
            sums = torch.zeros(len(batch.rows), device=logps.device).index_add(0, owner, logps)
            dpo(sums[0::2], sums[1::2]).backward()
    scorer.zero_grad(set_to_none=True)


def padded_step(model: torch.nn.Module, rows: RowSet, device: torch.device, micro: int = 8) -> None:
    """Rows of [prompt | completion] padded to the longest of a micro-batch, logits of the completions only."""
    for begin in range(0, rows.num_examples, micro):
        examples = range(begin, min(begin + micro, rows.num_examples))
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
        with torch.autocast(device.type, dtype=torch.bfloat16):
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


if __name__ == "__main__":
    main()
