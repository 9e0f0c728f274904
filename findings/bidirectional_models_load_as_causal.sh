#!/usr/bin/env bash
# transformers 5.19.0, torch 2.13.0 (CPU).
#
# `AutoModelForCausalLM` registers encoders too (BERT, RoBERTa, ELECTRA, ...), which are causal only with
# `is_decoder=True` in their configuration; published checkpoints have it false. Without it the model loads and
# answers, but every position sees the tokens behind it, so what looks like the log-prob of a token given its
# prefix is not one: it changes when a later token changes. A line in the log advises is_decoder=True "if you want to use it
# as a standalone"; nothing stops.
#
# Expected of a causal LM: position t depends on tokens up to t. Seen: logits of the first position move when the
# last token is exchanged; with is_decoder=True they do not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 numpy

"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoModelForCausalLM, BertConfig, ElectraConfig, RobertaConfig

sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
for kind in (BertConfig, RobertaConfig, ElectraConfig):
    moved = []
    for is_decoder in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**sizes, is_decoder=is_decoder, initializer_range=0.3)).eval()
        ids = torch.arange(5, 13)[None]
        other = ids.clone()
        other[0, -1] = 40
        with torch.no_grad():
            moved.append((model(input_ids=ids).logits[0, 0] - model(input_ids=other).logits[0, 0]).abs().max().item())
    print(f"{kind.model_type}: first position moves by {moved[0]:.2f}, with is_decoder=True by {moved[1]:.2f}")
    assert moved[0] > 0.01 and moved[1] == 0.0, "the behaviour has changed"
PY
