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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.engine_world import SHAPE, World, build_world

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Work:
    """What one cell of the benchmark measures."""

    system: str
    task: str
    dtype: str
    dataset: str
    max_length: int
    vocabulary: int
    batch: int
    rounds: int
    data: str

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


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


def reference_values(world: World, row: int) -> np.ndarray:
    """Stand-ins for cached reference log-probs, near what a random model gives; the same for every system."""
    noise = np.random.default_rng([7, row]).normal(0, 0.05, world.rows.completion_lengths[row])
    return (-np.log(world.vocabulary) + noise).astype(np.float32)


class Ours:
    """The engine, the step and the store of this project."""

    def __init__(self, work: Work, world: World) -> None:
        from stages.allocator import keep_freed_memory
        from stages.batches import RowScorer
        from stages.compute import Compute
        from stages.losses import parse_loss
        from stages.models import ModelSource, load_model
        from stages.parallel import World as Ranks
        from stages.scoring import Scorer

        keep_freed_memory()
        self.work, self.world = work, world
        compute = Compute(torch.device("cpu"), work.compute_dtype, 2048)
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
        from stages.steps import accumulate_step

        metrics, _ = accumulate_step(self.rows, self.loss, examples, {"delta": 0.0})
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics["loss"]

    def _cache(self, examples: list[int]) -> float:
        """Score the examples and write them to a store, as `align cache-ref` does; the sum of log-probs."""
        from cache.ref_logps import RefLogps
        from stages.cache_ref import _score_unit

        groups = [self.world.rows.example_rows(example, mismatched=False) for example in examples]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            keys, values, _ = _score_unit(self.world.rows, groups, self.scorer)
            RefLogps(Path(folder), {"reference": "benchmark"}).add(keys, values)
        return float(sum(value.sum() for value in values))


class _Reference:
    """A store of stand-ins, read like the real one."""

    def __init__(self, world: World) -> None:
        self._values = {key: reference_values(world, row) for row, key in enumerate(world.rows.keys)}

    def get(self, key: bytes) -> np.ndarray:
        return self._values[key]


class Peer:
    """TRL's trainer: its collator, forward, loss, backward and optimizer, on our token ids."""

    def __init__(self, work: Work, world: World) -> None:
        import trl.trainer.utils

        if work.system == "compact":
            trl.trainer.utils._use_triton = lambda device: True
        self.work, self.world = work, world
        self.trainer = _trainer(work, world)
        self.trainer.current_gradient_accumulation_steps = 1  # what train() would set
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.optimizer = self.trainer.create_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE

    def run(self, examples: list[int]) -> float:
        return self._cache(examples) if self.work.task == "cache_ref" else self._step(examples)

    def _step(self, examples: list[int]) -> float:
        rows = [row for example in examples for row in columns(self.world, example, self.work.task)]
        inputs = self.trainer.data_collator(rows)
        loss = self.trainer.training_step(self.model, inputs)
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def _cache(self, examples: list[int]) -> float:
        """TRL's own precomputation over these pairs, its batches and its file included."""
        from datasets import Dataset

        rows = [row for example in examples for row in columns(self.world, example, "dpo")]
        for row in rows:
            row.pop("ref_chosen_logps"), row.pop("ref_rejected_logps")
        self.trainer._precompute_model_hash = str(time.perf_counter_ns())
        found = self.trainer._precompute_for_real(Dataset.from_list(rows), "benchmark", 8)
        return float(sum(found["ref_chosen_logps"]) + sum(found["ref_rejected_logps"]))


def columns(world: World, example: int, task: str) -> list[dict[str, Any]]:
    """An example as rows of TRL's tokenized datasets."""
    rows = world.rows
    matched = rows.example_rows(example, mismatched=False)
    prompt = rows.prompt(matched[0]).tolist()

    def reference(row: int) -> float:
        return float(reference_values(world, row).sum())

    if task != "kto":
        chosen, rejected = matched
        ids = {
            "chosen_ids": rows.completion(chosen).tolist(),
            "rejected_ids": rows.completion(rejected).tolist(),
        }
        values = {"ref_chosen_logps": reference(chosen), "ref_rejected_logps": reference(rejected)}
        return [{"prompt_ids": prompt, **ids, **values}]
    return [
        {
            "prompt_ids": prompt,
            "completion_ids": rows.completion(row).tolist(),
            "KL_completion_ids": rows.completion(other).tolist(),
            "label": rows.roles[row] == "chosen",
            "ref_logps": reference(row),
            "ref_KL_logps": reference(other),
        }
        for row, other in zip(matched, rows.example_rows(example, mismatched=True), strict=True)
    ]


def _trainer(work: Work, world: World) -> Any:
    """A DPO or KTO trainer whose data is tokenized already and whose reference values are given."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    base, config = (KTOTrainer, KTOConfig) if work.task == "kto" else (DPOTrainer, DPOConfig)

    class Tokenized(base):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_for_real(self, *args):
            return base._precompute_ref_logps(self, *args)

    model = AutoModelForCausalLM.from_pretrained(world.model_folder, dtype=torch.float32)
    settings = config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.batch if work.task != "kto" else 2 * work.batch,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        max_length=work.max_length,
        bf16=work.dtype == "bfloat16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential" if work.task == "kto" else "random",
        report_to=[],
        use_cpu=True,
    )
    data = Dataset.from_list(columns(world, 0, "kto" if work.task == "kto" else "dpo"))
    tokenizer = AutoTokenizer.from_pretrained(world.model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    return Tokenized(model=model, args=settings, train_dataset=data, processing_class=tokenizer)


if __name__ == "__main__":
    main()
