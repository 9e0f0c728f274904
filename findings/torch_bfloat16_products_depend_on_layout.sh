#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# On an x86 processor without AVX-512 (most laptops and desktops, many servers), torch does not give products of bfloat16 to oneDNN
# but computes them in a loop of its own.
#
# Expected: some slowdown against float32, about the same for each of the three products of a linear layer. Seen, one thread, 512
# tokens, 512 -> 1,024: the forward pass (x @ W.T) and the gradient of the weights (g.T @ x) take 4 to 9 times as long as in float32, the
# gradient of the input (g @ W), which has the same number of operations, 40 to 100 times. Nothing is said about it. A processor with
# AVX-512 takes the same way here, because ONEDNN_MAX_CPU_ISA hides it from oneDNN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cd "$folder"

ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import platform
import statistics
import time

import torch

if platform.machine() != "x86_64":
    raise SystemExit("this is about x86 processors")
torch.set_num_threads(1)


def seconds(product) -> float:
    found = []
    for _ in range(4):
        began = time.process_time()
        product()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def products(dtype):
    x, weight, gradient = (torch.randn(*shape).to(dtype) for shape in ((512, 512), (1024, 512), (512, 1024)))
    return {
        "forward, x @ W.T": lambda: x @ weight.T,
        "weights, g.T @ x": lambda: gradient.T @ x,
        "input, g @ W": lambda: gradient @ weight,
    }


plain, halved = products(torch.float32), products(torch.bfloat16)
times = {name: seconds(halved[name]) / seconds(plain[name]) for name in plain}
for name, ratio in times.items():
    print(f"{name}: bfloat16 takes {ratio:.1f} times as long as float32")
assert times["input, g @ W"] > 20, "products of bfloat16 are faster now"
assert times["input, g @ W"] > 3 * times["forward, x @ W.T"], "both layouts take alike now"
PY
