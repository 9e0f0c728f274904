#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of eight minutes at most: the tests that need one, then speed,
# memory and MFU on a 1B model's shape. Results are written as they come, so that an interruption loses one row.
#
#   benchmarks/gpu.sh [--device cpu --tiny] [--out FOLDER] [--wheels FOLDER] [--seconds N]
#
# --wheels: a folder of wheels for what the machine's Python lacks; they are installed beside it for this run only.
# --seconds: the most that each of the three measurements may take (80). PYTHON names the interpreter.
# --device cpu --tiny: the same code on a CPU and a tiny model in a minute.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda tiny="" out=benchmarks/results wheels="" seconds=80
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=--tiny; shift ;;
    --device | --out | --wheels | --seconds)
      [ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
      case $1 in --device) device=$2 ;; --out) out=$2 ;; --wheels) wheels=$2 ;; --seconds) seconds=$2 ;; esac
      shift 2 ;;
    *) echo "unknown argument $1; $0 [--device cpu --tiny] [--out FOLDER] [--wheels FOLDER] [--seconds N]" >&2; exit 2 ;;
  esac
done

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH=$PWD:$site
fi
mkdir -p "$out"

# A test compiles a kernel for each shape, which takes the time of the processor and not of the GPU: several at once.
workers=()
if [ -z "$tiny" ] && "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
only=(-m gpu)
if [ -n "$tiny" ]; then only+=(-k "float32_log_probs and llama/plain-align_tree or serves_a_gpu"); fi
if [ "$device" = cpu ]; then export ALIGN_GPU_TESTS_ON=cpu; fi
timeout 200 "$python" -m pytest tests/gpu "${only[@]}" "${workers[@]}" -p no:cacheprovider -rs --durations=10 2>&1 | tee "$out/gpu_tests.log"
tests=${PIPESTATUS[0]}

timeout $((3 * seconds + 60)) "$python" benchmarks/gpu.py --device "$device" $tiny --seconds "$seconds" --out "$out" 2>&1 | tee "$out/gpu.log"
measured=${PIPESTATUS[0]}

echo "tests ended with $tests, measurements with $measured; results in $out"
[ "$tests" = 0 ] && [ "$measured" = 0 ]
