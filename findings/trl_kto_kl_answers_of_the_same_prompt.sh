#!/usr/bin/env bash
# trl 1.16.0, transformers 5.19.0, torch 2.13.0 (CPU).
#
# KTO estimates its KL divergence from completions that do not belong to their prompts. TRL makes them by moving completions on by
# one place within each batch of the file's order, and demands that order for training (train_sampling_strategy="sequential").
# Rated answers are often kept prompt by prompt, several to each.
#
# Expected: every KL completion answers another prompt. Seen: with four answers to a prompt and batches of four, each of the 32 KL
# completions is another answer to its own prompt; in shuffled rows few are. Nothing is said about it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate==1.13.0 datasets==5.2.0
cd "$folder"

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import logging
import random

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer

logging.disable(logging.WARNING)
PROMPTS, ANSWERS = 8, 4
words = ["<pad>", "<end>", *(f"q{p}" for p in range(PROMPTS)), *(f"a{p}x{n}" for p in range(PROMPTS) for n in range(ANSWERS))]
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def model():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **shape))


def answers_of_own_prompt(rows) -> int:
    settings = KTOConfig(
        output_dir="out", per_device_train_batch_size=ANSWERS, train_sampling_strategy="sequential", use_cpu=True,
        bf16=False, report_to="none",
    )
    trainer = KTOTrainer(
        model=model(), ref_model=model(), args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    own = 0
    for row in trainer.train_dataset:
        prompt, answer = (tokenizer.decode(row[name]).split()[0] for name in ("prompt_ids", "KL_completion_ids"))
        own += answer.startswith(prompt.replace("q", "a") + "x")
    return own


rows = [
    {"prompt": f"q{p}", "completion": f" a{p}x{n}", "label": n % 2 == 0} for p in range(PROMPTS) for n in range(ANSWERS)
]
sorted_rows = answers_of_own_prompt(rows)
random.Random(0).shuffle(rows)
shuffled = answers_of_own_prompt(rows)
print(f"of {len(rows)} KL completions, answers to their own prompt: {sorted_rows} in rows by prompt, {shuffled} in shuffled rows")
assert (sorted_rows, shuffled < len(rows) / 4) == (len(rows), True), "the behaviour has changed"
PY
