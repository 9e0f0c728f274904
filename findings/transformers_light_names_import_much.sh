#!/usr/bin/env bash
# transformers 5.19.0, peft 0.21.2, bitsandbytes 0.50.2, scikit-learn 1.7.2, torch 2.13.0 (CPU).
#
# transformers imports its parts lazily, so that a script pays for what it names.
#
# Expected: `get_scheduler`, a dozen formulas of a learning rate, and `AutoTokenizer`, which reads a tokenizer.json, need neither
# quantization nor statistics. Seen: `get_scheduler` imports peft and, through it, bitsandbytes; `AutoTokenizer` imports generation, and
# with it scikit-learn, scipy, torch._dynamo and torch.distributed.tensor. Each takes seconds where the plain
# PreTrainedTokenizerFast takes a fraction. It depends on what else is installed: nothing in the script names these packages.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.19.0 peft==0.21.2 bitsandbytes==0.50.2 scikit-learn==1.7.2
cd "$folder"

cat > imported.py <<'PY'
import importlib
import os
import sys

name, wanted = sys.argv[1], sys.argv[2:]
getattr(importlib.import_module("transformers"), name)
times = os.times()
found = [package for package in wanted if package in sys.modules]
print(f"{name}: {times.user + times.system:.1f} processor seconds, with {', '.join(found) or 'none of them'}")
sys.exit(0 if found == wanted else 3)
PY
python="$folder/venv/bin/python -W ignore"
export HF_HUB_OFFLINE=1
$python imported.py PreTrainedTokenizerFast >/dev/null # compiles what the others import too
$python imported.py AutoTokenizer sklearn >/dev/null || true
$python imported.py PreTrainedTokenizerFast sklearn && { echo "PreTrainedTokenizerFast imports scikit-learn too now"; exit 1; }
$python imported.py AutoTokenizer sklearn scipy torch._dynamo torch.distributed.tensor
$python imported.py get_scheduler peft bitsandbytes
