#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# torch.compile keeps the C++ that it generates in a cache on disk and finds it again by a key. Which vector instructions the code was
# generated for (AVX2, AVX-512, none) is not in the key, unless torch._inductor.config.cpp.simdlen is set.
#
# Expected: a process that may use other vector instructions, as ATEN_CPU_CAPABILITY says, misses the cache and generates its own code.
# Seen: it hits the cache, takes the vectorized source of the first process, compiles it without vector instructions, and raises a C++
# compile error: at::vec has not been declared. In the other order both work, and the second runs the first one's scalar code. With
# simdlen set, each process has its own entry, and all work. The default folder of the cache is one for all processes of a user.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cd "$folder"
cat > doubled.py <<'PY'
import sys

import torch
from torch._inductor import config, cpu_vec_isa

isa = cpu_vec_isa.pick_vec_isa()
if "named" in sys.argv:
    config.cpp.simdlen = isa.bit_width() or 1
try:
    torch.compile(lambda values: values + values)(torch.ones(8))
    ended = "ran"
except Exception as error:
    [ended, *_] = [line.split(": ", 1)[1] for line in str(error).splitlines() if "error:" in line]
hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print(f"{isa}: {ended}" + (f", {hits} from the cache" if ended == "ran" else ""))
PY

compiled() { # the folder of the cache, the capability, and arguments
  TORCHINDUCTOR_CACHE_DIR="$folder/$1" ATEN_CPU_CAPABILITY=$2 "$folder/venv/bin/python" -W ignore doubled.py "${@:3}"
}

first=$(compiled mixed avx2)
second=$(compiled mixed default)
other_way=$(compiled scalar_first default; compiled scalar_first avx2)
named=$(compiled named avx2 named; compiled named default named)
printf '%s\n' "one cache:" "$first" "$second" "the other way round:" "$other_way" "with simdlen set:" "$named"
[[ $first == "avx2: ran, 0 from the cache" ]] || { echo "no AVX2 or no C++ compiler here"; exit 1; }
[[ $second == "INVALID_VEC_ISA: error: "*"at::vec"* ]] || { echo "the key of the cache knows the instructions now"; exit 1; }
[[ $other_way == *"avx2: ran, 1 from the cache" ]] || { echo "scalar code is not taken for AVX2 now"; exit 1; }
[[ $named == *"avx2: ran, 0 from the cache"*"INVALID_VEC_ISA: ran, 0 from the cache" ]] || { echo "naming the width does not keep entries apart now"; exit 1; }
