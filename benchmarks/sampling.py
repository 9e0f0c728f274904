"""Throughput of `align sample` beside a bare vLLM loop on the same prompts, start-up apart.

In: a model folder. Both generate the same completions of random prompts, in turns, each with an engine that stays loaded:
ours through the worker process and the journal of the stage, the other with `LLM.generate` alone. With `--copies 2`, also ours
with two copies of the model. Out: `results/sampling.json` and `.md`. Run from the repository root:

    python benchmarks/sampling.py --model FOLDER [--prompts 256] [--max-tokens 64] [--rounds 5] [--copies 2]
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import write_results
from stages.generation.engines import open_engine
from stages.generation.generate import requests_of
from stages.generation.open_model import open_model
from stages.generation.requests import EngineOptions, Prompt, Sampling
from stages.sample.journal import Journal

BARE = """
import json, sys, time
from stages.generation.vllm_worker import _set_environment
_set_environment()
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
job = json.loads(sys.stdin.readline())
llm = LLM(skip_tokenizer_init=True, **job["engine"])
for line in sys.stdin:
    began = time.monotonic()
    prompts = [TokensPrompt(prompt_token_ids=one["ids"]) for one in job["requests"]]
    how = [SamplingParams(seed=one["seed"], detokenize=False, ignore_eos=True, **job["sampling"]) for one in job["requests"]]
    outputs = llm.generate(prompts, how, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    print("RESULT " + json.dumps([time.monotonic() - began, ids]), flush=True)
"""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--prompts", type=int, default=256)
    options.add_argument("--max-tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--copies", type=int, default=1)
    arguments = options.parse_args()
    rows = compare(
        arguments.model, arguments.prompts, arguments.max_tokens, arguments.rounds, arguments.copies
    )
    notes = (
        f"{arguments.model.name}, {arguments.prompts} prompts of 8 to 32 random tokens, {arguments.max_tokens} new tokens at most, "
        f"temperature 1, float32, {arguments.rounds} rounds in turns after one of warm-up; median seconds of a round, start-up apart. "
        "`same` says whether the token ids are those of the bare loop."
    )
    write_results("sampling", rows, "Sampling beside a bare vLLM loop", notes)


def compare(folder: Path, number: int, max_tokens: int, rounds: int, copies: int) -> list[dict[str, Any]]:
    sampling = Sampling(1.0, 1.0, 0, max_tokens, 0, 1)
    options = EngineOptions("float32", max_model_length=32 + max_tokens)
    model = open_model(folder, sampling, options)
    draw = random.Random(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [
        Prompt(str(index), "", [draw.randrange(10, vocabulary) for _ in range(draw.randint(8, 32))])
        for index in range(number)
    ]
    requests = requests_of(prompts, sampling)
    bare = start_bare(model, requests, max_tokens)
    ways = {"align": options} | (
        {f"align, {copies} copies": replace(options, data_parallel_size=copies)} if copies > 1 else {}
    )
    seconds: dict[str, list[float]] = {name: [] for name in ("bare vLLM", *ways)}
    answers: dict[str, list[list[int]]] = {}
    engines = {name: open_engine("vllm") for name in ways}
    try:
        running = {name: engine.__enter__() for name, engine in engines.items()}
        for _ in range(rounds + 1):
            took, answers["bare vLLM"] = ask(bare)
            seconds["bare vLLM"].append(took)
            for name, how in ways.items():
                with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch)) as journal:
                    began = time.monotonic()
                    for place, ids in running[name].complete(model, requests, sampling, how):
                        journal.add((1, place, 0), ids)
                    seconds[name].append(time.monotonic() - began)
                    answers[name] = [journal.finished[1, place, 0] for place in range(number)]
    finally:
        for engine in engines.values():
            engine.__exit__(None, None, None)
        bare.kill()
    tokens = sum(map(len, answers["bare vLLM"]))
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    return [
        {
            "name": name,
            "seconds": medians[name],
            "tokens a second": tokens / medians[name],
            "of bare": medians["bare vLLM"] / medians[name],
            "same": answers[name] == answers["bare vLLM"],
        }
        for name in seconds
    ]


def start_bare(model: Any, requests: list, max_tokens: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", BARE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    job = {
        "engine": {
            "model": str(model.path),
            "dtype": "float32",
            "max_model_len": model.max_length,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 512 << 20,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 4096,
            "generation_config": "vllm",
        },
        "requests": [{"ids": one.prompt_ids, "seed": one.seed} for one in requests],
        "sampling": {"temperature": 1.0, "max_tokens": max_tokens, "stop_token_ids": model.stop_token_ids},
    }
    assert process.stdin is not None
    process.stdin.write(json.dumps(job) + "\n")
    return process


def ask(process: subprocess.Popen) -> tuple[float, list[list[int]]]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("RESULT "):
            took, ids = json.loads(line.removeprefix("RESULT "))
            return took, ids
    raise SystemExit("the bare loop ended")


if __name__ == "__main__":
    main()
