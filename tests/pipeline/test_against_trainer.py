"""The loop against `transformers.Trainer`, on the one loss both have: mean negative log-prob a completion token.

Same rows in the same order, same AdamW, same rates (ours, handed to the Trainer): 20 steps in float32. The Trainer
pads each completion's own sequence and masks the prompt; here prompts are shared and packed, and the rejected
completions are scored beside the chosen ones.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.run import Session
from stages.data.rows import RowSet
from stages.train.data_order import epoch_order
from stages.train.schedules import make_schedule
from tests.pipeline.small_run import session, settings

STEPS, BATCH, RATE = 20, 4, 2e-4


@pytest.fixture
def ours(tiny_model, preferences, tmp_path) -> tuple[Session, dict]:
    tree = settings(
        tiny_model,
        preferences,
        prepare={"heldout_fraction": 0.0, "mismatched": False},
        compute={"tokens_per_batch": 150},
        loss={"name": "sft"},
        train={"learning_rate": RATE, "batch_size": BATCH, "num_epochs": 4, "max_steps": STEPS},
    )
    run = session(tree, tmp_path / "store")
    run.run("prepare")
    return run, run.run("train")


def examples_of(session: Session) -> list[dict]:
    """The chosen completions in the order in which our loop takes them, epoch after epoch."""
    rows = RowSet.of(session.inputs.job.rows, "train")
    found = []
    for epoch in range(4):
        for example in epoch_order(rows.cycles, 0, epoch):
            (chosen,) = [row for row in rows.example_rows(example, False) if rows.roles[row] == "chosen"]
            prompt, completion = rows.prompt(chosen).tolist(), rows.completion(chosen).tolist()
            kept = [
                token if keep else -100
                for token, keep in zip(completion, rows.mask(chosen).tolist(), strict=True)
            ]
            found.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + kept})
    return found


def test_twenty_steps_are_those_of_transformers_trainer(ours, tiny_model, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    run, result = ours
    rows = examples_of(run)
    assert len(rows) % BATCH == 0  # no partial step: the Trainer's batches know no epochs here

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        pad = {"input_ids": 1, "labels": -100}
        columns = {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])
            for name, value in pad.items()
        }
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {**columns, "attention_mask": torch.tensor(mask)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = make_schedule(run.config.train, RATE, STEPS)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule(min(done + 1, STEPS)) / RATE)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=BATCH // 2,
        max_steps=STEPS,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(
        model, arguments, train_dataset=rows, data_collator=collate, optimizers=(optimizer, rates)
    )
    trainer.train()

    folder = Path(result["artifact"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(lines) == len(log) == STEPS
    for line, theirs in zip(lines, log, strict=True):
        assert line["loss"] == pytest.approx(theirs["loss"], abs=1e-6, rel=1e-6)
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert line["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)
    trained, start = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    named = {name: tensor.detach() for name, tensor in model.named_parameters()}
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in trained.items())
    apart = max(float((tensor - named[name]).abs().max()) for name, tensor in trained.items())
    assert moved > 1e-3
    assert apart < 1e-6
