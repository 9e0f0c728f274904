#!/usr/bin/env bash
# transformers 5.19.0, torch 2.13.0 (CPU).
#
# A model folder as save_pretrained of the model alone writes it (config.json and weights) holds no tokenizer. For a GPT-2
# AutoTokenizer opens one all the same: a vocabulary of one entry, under which every text has no tokens at all. Nothing is raised.
#
# Expected: an error, as for a Llama. Seen: a tokenizer of length 1, and [] for "hello world".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 numpy

"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ids = {"bos_token_id": 1, "eos_token_id": 2}
gpt2, llama = f"{sys.argv[1]}/gpt2", f"{sys.argv[1]}/llama"
GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, **ids)).save_pretrained(gpt2)
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, **ids,
    )
).save_pretrained(llama)

found = AutoTokenizer.from_pretrained(gpt2)
print(f"GPT-2: {type(found).__name__} of length {len(found)}, 'hello world' -> {found('hello world').input_ids}")
assert len(found) == 1 and found("hello world").input_ids == [], "the behaviour has changed"
try:
    AutoTokenizer.from_pretrained(llama)
    raise AssertionError("the behaviour has changed: a Llama folder without a tokenizer opens too")
except ValueError as error:
    print(f"Llama: ValueError, {str(error).splitlines()[0]}")
PY
