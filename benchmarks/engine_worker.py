"""One system of the engine's benchmark in a process of its own, driven line by line by `engine.py`.

In: a JSON description of the work as the only argument, then lines `ORDER ROUND` on stdin. Out: one JSON
object a line on stdout: `{"ready": ...}` once, then for each round its seconds, pairs and loss, and the peak
memory so far. Systems: `ours`; TRL's own trainers, whose token ids are handed to them: `shipped` (on a CPU
every position goes through its head), `compact` (completion positions only, what it does on a GPU).
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.engine_peer import Peer
from benchmarks.engine_world import LEARNING_RATE, SHAPE, Work, World, build_world, reference_values


def main() -> None:
    work = Work(**json.loads(sys.argv[1]))
    torch.set_num_threads(2)
    world = build_world(Path(work.data), work.dataset, work.max_length, work.vocabulary, work.task == "kto")
    system = (Ours if work.system == "ours" else Peer)(work, world)
    print(json.dumps({"ready": work.system}), flush=True)
    loaded = peak_bytes()
    for line in sys.stdin:
        order, number = line.split()
        examples = batches(world, work, order)[int(number)]
        began = time.perf_counter()
        loss = system.run(examples)
        seconds = time.perf_counter() - began
        row = {
            "seconds": seconds,
            "pairs": len(examples),
            "loss": loss,
            "flops": (useful_flops if work.system == "ours" else executed_flops)(world, work, examples),
        }
        print(json.dumps({**row, "peak_bytes": peak_bytes() - loaded}), flush=True)


def batches(world: World, work: Work, order: str) -> list[list[int]]:
    """Examples of each round: drawn at random, or neighbours in a data set presorted by length.

    Round 0 warms up. A presorted round lies at an even quantile of the lengths. Whole cycles of four keep
    kto's mismatched rows together.
    """
    count = work.rounds + 1
    rows = world.rows
    if order == "sorted":
        lengths = np.maximum.reduceat(rows.prompt_lengths + rows.completion_lengths, rows.starts)
        ranked = np.argsort(lengths, kind="stable")
        starts = [int((len(ranked) - work.batch) * (number + 0.5) / count) for number in range(count)]
        return [ranked[start : start + work.batch].tolist() for start in starts]
    groups = rows.num_examples // 4
    drawn = np.random.default_rng(1).permutation(groups)[: count * work.batch // 4]
    examples = (4 * drawn[:, None] + np.arange(4)).reshape(count, work.batch)
    return examples.tolist()


def useful_flops(world: World, work: Work, examples: list[int]) -> float:
    """Model FLOPs that the work needs: 6 a parameter and token trained, 2 scored; attention is left out.

    The body sees each prompt once and every completion token, the head completion tokens only.
    """
    rows, body = world.rows, body_parameters()
    head = SHAPE["hidden_size"] * world.vocabulary
    passes = {"dpo": [(False, 6)], "kto": [(False, 6), (True, 2)], "cache_ref": [(False, 2)]}[work.task]
    total = 0.0
    for mismatched, factor in passes:
        for example in examples:
            own = rows.example_rows(example, mismatched)
            completions = int(rows.completion_lengths[own].sum())
            total += factor * (body * (int(rows.prompt_lengths[own[0]]) + completions) + head * completions)
    return total


def executed_flops(world: World, work: Work, examples: list[int]) -> float:
    """Model FLOPs that TRL runs for the same pairs: every sequence whole and padded to the longest.

    Its tiled head (`compact`) makes the logits again in the backward pass: 8 a parameter and token, not 6.
    """
    rows, width = world.rows, SHAPE["hidden_size"]
    head = width * world.vocabulary
    passes = {"dpo": [(False, True)], "kto": [(False, True), (True, False)], "cache_ref": [(False, False)]}
    total = 0.0
    for mismatched, trained in passes[work.task]:
        own = np.concatenate([rows.example_rows(example, mismatched) for example in examples])
        positions = len(own) * int((rows.prompt_lengths[own] + rows.completion_lengths[own]).max())
        scored = positions if work.system == "shipped" else int(rows.completion_lengths[own].sum())
        per_logit = (6 if work.system == "shipped" else 8) if trained else 2
        total += (6 if trained else 2) * body_parameters() * positions + per_logit * head * scored
    return total


def body_parameters() -> int:
    """Weights of the transformer's matrix products, without embedding and head."""
    width, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    return layers * (4 * width**2 + 3 * width * SHAPE["intermediate_size"])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Ours:
    """The engine, the step and the store of this project."""

    def __init__(self, work: Work, world: World, compiled: bool = False) -> None:
        from stages.engine.scorer import Scorer
        from stages.losses import parse_loss
        from stages.models.loading import ModelSource, load_model
        from stages.runtime.compute import Compute
        from stages.runtime.distributed import World as Ranks
        from stages.runtime.malloc import keep_freed_memory
        from stages.train.step.row_scorer import RowScorer

        keep_freed_memory()
        self.work, self.world = work, world
        compute = Compute(torch.device("cpu"), getattr(torch, work.dtype), 2048, compile=compiled)
        model = load_model(ModelSource("benchmark", world.model_folder), compute)
        self.scorer = Scorer(model, compute, print)
        self.loss = parse_loss({"name": "kto" if work.task == "kto" else "dpo"})
        reference: Any = _Reference(world)
        self.rows = RowScorer(self.scorer, world.rows, reference, self.loss, Ranks())
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

    def run(self, examples: list[int]) -> float:
        return self._cache(examples) if self.work.task == "cache_ref" else self._step(examples)

    def _step(self, examples: list[int]) -> float:
        from stages.train.step.step import accumulate_step

        metrics, _ = accumulate_step(self.rows, self.loss, examples, {"delta": 0.0})
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics["loss"]

    def _cache(self, examples: list[int]) -> float:
        """Score the examples and write them to a store, as `align cache-ref` does; the sum of log-probs."""
        from cache.ref_logps import RefLogps
        from stages.cache_ref.stage import score_unit
        from stages.cache_ref.work_units import WorkUnit

        groups = [self.world.rows.example_rows(example, mismatched=False) for example in examples]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            unit = WorkUnit(self.world.rows, groups)
            values, _ = score_unit(unit, self.scorer)
            RefLogps(Path(folder), {"reference": "benchmark"}).add(unit.keys, values)
        return float(sum(value.sum() for value in values))


class _Reference:
    """A store of stand-ins, read like the real one."""

    def __init__(self, world: World) -> None:
        self._values = {key: reference_values(world, row) for row, key in enumerate(world.rows.keys)}

    def get(self, key: bytes) -> np.ndarray:
        return self._values[key]


if __name__ == "__main__":
    main()
