"""TRL's own DPO step on given token ids, for the measurements on a GPU.

In: a model and tokenized pairs. Out: a callable that does one forward and backward pass over all of them, in
micro-batches of 8 pairs. Reference log-probs are given, so that neither side runs the reference.
"""

import tempfile
from typing import Any

import torch

from stages.data.rows import RowSet
from stages.runtime.compute import Compute

MICRO = 8


class TrlStep:
    """TRL's collator, forward, loss and backward, under bfloat16 autocast over float32 weights."""

    def __init__(self, model: Any, rows: RowSet, compute: Compute) -> None:
        self._columns = [_columns(rows, example) for example in range(rows.num_examples)]
        self._trainer = _trainer(model, self._columns, compute)
        self._trainer.current_gradient_accumulation_steps = 1  # what train() would set
        self._model = self._trainer.accelerator.prepare(self._trainer.model)

    def __call__(self) -> None:
        for begin in range(0, len(self._columns), MICRO):
            inputs = self._trainer.data_collator(self._columns[begin : begin + MICRO])
            self._trainer.training_step(self._model, inputs)
        self._model.zero_grad(set_to_none=True)


def _columns(rows: RowSet, example: int) -> dict[str, Any]:
    chosen, rejected = rows.example_rows(example, mismatched=False)
    return {
        "prompt_ids": rows.prompt(chosen).tolist(),
        "chosen_ids": rows.completion(chosen).tolist(),
        "rejected_ids": rows.completion(rejected).tolist(),
        "ref_chosen_logps": -100.0,
        "ref_rejected_logps": -100.0,
    }


def _trainer(model: Any, columns: list[dict[str, Any]], compute: Compute) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset

    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=MICRO,
        max_length=None,
        bf16=compute.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        report_to=[],
        use_cpu=compute.device.type == "cpu",
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    data = Dataset.from_list(columns[:1])
    return Tokenized(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
