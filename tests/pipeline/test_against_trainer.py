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

from pipeline.session import Session
from stages.data.rows import RowSet
from stages.train.data_order import epoch_order
from stages.train.schedules import make_schedule
from tests.pipeline.small_run import session, settings

pytestmark = pytest.mark.slow

STEPS, BATCH, RATE = 20, 4, 2e-4
# Rounding's largest effect over steps and micro-batches is a sample; a sum in yet another order stays within ten of it.
SPREADS = 10


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
        for example in epoch_order(rows.mismatch_groups, 0, epoch):
            (chosen,) = [row for row in rows.example_rows(example, False) if rows.roles[row] == "chosen"]
            prompt, completion = rows.prompt(chosen).tolist(), rows.completion(chosen).tolist()
            kept = [
                token if keep else -100
                for token, keep in zip(completion, rows.mask(chosen).tolist(), strict=True)
            ]
            found.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + kept})
    return found


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    pad = {"input_ids": 1, "labels": -100}
    columns = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])
        for name, value in pad.items()
    }
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
    return {**columns, "attention_mask": torch.tensor(mask)}


def by_trainer(
    session: Session, model_folder: Path, rows: list[dict], micro_batch: int, folder: Path
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What the Trainer logs at each step and the weights it ends with, with micro-batches of so many rows."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = make_schedule(session.config.train, RATE, STEPS)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule(min(done + 1, STEPS)) / RATE)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
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
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    return log, {name: tensor.detach() for name, tensor in model.named_parameters()}


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights of the same name."""
    return max(float((tensor - two[name]).abs().max()) for name, tensor in one.items())


def furthest(one: list[dict], two: list[dict], name: str) -> float:
    """The largest difference of a metric over all steps."""
    return max(abs(ours[name] - theirs[name]) for ours, theirs in zip(one, two, strict=True))


def test_twenty_steps_are_those_of_transformers_trainer(ours, tiny_model, tmp_path) -> None:
    """Rates are equal; the rest is as near as the Trainer is to itself with other micro-batches, on this processor."""
    run, result = ours
    rows = examples_of(run)
    assert len(rows) % BATCH == 0  # no partial step: the Trainer's batches know no epochs here
    logs, weights = zip(
        *(by_trainer(run, tiny_model, rows, size, tmp_path / str(size)) for size in (1, 2, 4)), strict=True
    )
    folder = Path(result["artifact"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(lines) == len(logs[0]) == STEPS
    for line, theirs in zip(lines, logs[0], strict=True):
        assert line["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)
    for name in ("loss", "grad_norm"):
        spread = max(furthest(log, logs[0], name) for log in logs)
        assert furthest(lines, logs[0], name) <= SPREADS * spread
    trained, start = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    spread = max(apart(weights[0], other) for other in weights)
    assert apart(trained, weights[0]) <= SPREADS * spread
    assert apart(trained, start) > 1000 * spread
