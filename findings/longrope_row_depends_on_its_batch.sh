#!/usr/bin/env bash
# transformers 5.19.0, torch 2.13.0 (CPU).
#
# Rotary scaling `longrope` (Phi-3-128k, Phi-3.5, Phi-4-mini) has two sets of factors: one for sequences up to
# `original_max_position_embeddings`, one for longer ones. transformers chooses the set by the largest position of
# the whole forward pass. A short row that shares a padded batch, or a pack, with a long one is therefore computed
# with the long factors, and its log-probs are not those that it has alone. No message is given.
#
# Expected of a batch: the rows do not depend on each other. Seen: the same 12 tokens, float32, correctly masked
# padding; the largest difference of a log-prob is printed below (nats).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 numpy

"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import Phi3Config, Phi3ForCausalLM

ORIGINAL, HALF = 16, 8
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, original_max_position_embeddings=ORIGINAL, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, attn_implementation="eager", initializer_range=0.3,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * HALF, "long_factor": [4.0] * HALF,
    },
)
model = Phi3ForCausalLM(config).eval()
short = torch.randint(3, 64, (1, 12))


def beside(length):
    """Log-probs of the short row, right-padded in a batch with another row of `length` tokens."""
    ids = torch.zeros(2, length, dtype=torch.long)
    mask = torch.zeros(2, length, dtype=torch.long)
    ids[0, :12], mask[0, :12] = short[0], 1
    ids[1], mask[1] = torch.randint(3, 64, (length,)), 1
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[0, :12].log_softmax(-1)


with torch.no_grad():
    alone = model(input_ids=short).logits[0].log_softmax(-1)
same = (beside(ORIGINAL) - alone).abs().max().item()
other = (beside(ORIGINAL + 8) - alone).abs().max().item()
print(f"beside a row of {ORIGINAL} tokens: {same:.1e} nats; beside one of {ORIGINAL + 8}: {other:.2f} nats")
assert same < 1e-4 < 0.1 < other, "the behaviour has changed"
PY
