"""TRL's side of the engine's benchmark: its own trainers, whose token ids and reference log-probs are handed to them."""

import tempfile
import time
from typing import Any

import torch

from benchmarks.engine_world import LEARNING_RATE, Work, World, reference_values


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
