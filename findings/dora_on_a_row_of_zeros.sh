#!/usr/bin/env bash
# peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU).
#
# DoRA divides each output row of a layer by the norm of that row of the weight. Models whose heads or vocabulary were padded to a
# round number have rows of zeros. On such a layer the untrained adapter, which should change nothing, gives NaN:
# 0 / 0. No message is given.
#
# Expected: an adapter just made leaves the logits as they are, as LoRA does. Seen: NaN with DoRA, equal with LoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 numpy

"$folder/venv/bin/python" - <<'PY'
import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )
).eval()
with torch.no_grad():
    base.model.layers[0].self_attn.v_proj.weight[8:16] = 0.0  # one padded head
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    alone = base(input_ids=ids).logits
for dora in (False, True):
    adapter = LoraConfig(r=4, target_modules=["v_proj"], use_dora=dora, task_type="CAUSAL_LM")
    with torch.no_grad():
        found = get_peft_model(copy.deepcopy(base), adapter).eval()(input_ids=ids).logits
    finite = bool(torch.isfinite(found).all())
    print(f"use_dora={dora}: finite {finite}, equal to the model without an adapter {torch.equal(found, alone)}")
    assert finite is not dora, "the behaviour has changed"
PY
