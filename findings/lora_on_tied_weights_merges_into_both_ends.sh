#!/usr/bin/env bash
# peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU).
#
# A model with tie_word_embeddings has one matrix for its embedding and its output layer. A LoRA adapter on the output layer is
# trained as a change of that end alone, and merge_and_unload() adds the change to the one matrix, so that the embedding
# changes too. `ensure_weight_tying=True`, which is there for tied layers, does not prevent it.
#
# Expected: the merged model has the logits of base and adapter. Seen: they differ by whole nats, with and without the option.
# peft warns of tied layers, and the merge goes on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 numpy

"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def difference(tied: bool, ensure: bool) -> float:
    """Between the logits of base and adapter and those of the merged model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    ).eval()
    adapter = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", ensure_weight_tying=ensure)
    model = get_peft_model(copy.deepcopy(base), adapter).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # as after training
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        before = model(input_ids=ids).logits
        after = model.merge_and_unload(safe_merge=True)(input_ids=ids).logits
    return float((before - after).abs().max())


for tied, ensure in ((False, False), (True, False), (True, True)):
    found = difference(tied, ensure)
    print(f"tied {tied}, ensure_weight_tying={ensure}: merged differs by {found:.2g}")
    assert (found > 0.1) is tied, "the behaviour has changed"
PY
