"""Runs vLLM in a process of its own, and leaves no memory, process or folder behind.

In:  models, requests (prompt ids, seeds).  Out: the token ids of each completion, for each model.

Only the exit of a process surely releases all that vLLM takes. The worker leads a process group; the group is killed
when this process is interrupted, and it kills itself when this process dies (its standard input is a pipe that only
closes then), so there are no orphans even after `kill -9`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from cache.errors import MachineError
from cache.files import read_json, write_bytes
from cache.ownership import claim, remove_abandoned, temporary_suffix
from cache.safetensors import INDEX, listed_files, weight_files
from stages.generation.requests import EngineOptions, Model, Request, Sampling
from stages.models.adapters import adapter_config

MIN_KV_CACHE_BYTES = 512 << 20
MIN_FULL_SEQUENCES = 2
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
TERMINATE_SECONDS = 5
PREFIX = "align-vllm-worker."
# pydantic, which vLLM validates with, puts the cause on a line of its own.
EXCEPTION = re.compile(r"[\w.]+(Error|Exception)(: .*|$)|Value error, .*")
VLLM_SYMPTOM = "Engine core initialization failed"
LAST_CAUSES = 2
LAST_LINES = 3
LAST_CHARACTERS = 600


def run_vllm(
    models: list[Model], requests: list[Request], sampling: Sampling, options: EngineOptions
) -> list[list[list[int]]]:
    """Token ids of every request's completion, for each model, including its stop token.

    Raises `MachineError` with the worker's last lines when it fails.
    """
    import torch

    for model in models:
        check_weight_files(model.path)
    # On a CPU one process can run one engine after the other: 3 to 4 seconds instead of a whole start.
    # On CUDA, and with several workers, only the exit frees the memory that the next one needs.
    share = not torch.cuda.is_available() and options.tensor_parallel_size == 1
    completions = []
    for group in [models] if share else [[model] for model in models]:
        completions += _run_worker(group, requests, sampling, options)
    return completions


def kv_cache_bytes(model: Model, options: EngineOptions) -> int:
    """Memory for keys and values on a CPU: as configured, or room for two sequences of full length.

    vLLM itself would take 92 % of the machine's memory.
    """
    if options.kv_cache_bytes is not None:
        return options.kv_cache_bytes
    text = model.config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", None)
    if not num_heads:  # a model without attention keeps no keys and values
        return MIN_KV_CACHE_BYTES
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    num_heads = getattr(text, "num_key_value_heads", None) or num_heads
    bytes_per_value = 4 if options.dtype == "float32" else 2
    per_token = 2 * text.num_hidden_layers * num_heads * head_dim * bytes_per_value
    return max(MIN_KV_CACHE_BYTES, MIN_FULL_SEQUENCES * model.max_length * per_token)


def lora_rank(adapter: Path) -> int:
    """The smallest of vLLM's LoRA ranks that fits this adapter; raises `MachineError` for an adapter that vLLM cannot run."""
    config = adapter_config(adapter)
    ranks = [rank for rank in LORA_RANKS if rank >= config["r"]]
    if config.get("use_dora") or not ranks:
        limit = (
            "no DoRA adapters"
            if config.get("use_dora")
            else f"adapters up to rank {LORA_RANKS[-1]}, and this one has {config['r']}"
        )
        raise MachineError(
            f"vLLM runs {limit} ({adapter}). Sample with --set sample.engine=transformers, or run `align merge` with the "
            f"arguments of `align train` and sample the folder it names: --set sample.model=FOLDER"
        )
    return ranks[0]


def check_weight_files(folder: Path) -> None:
    """Raise `MachineError` if vLLM would read other files than transformers: without an index it reads all there are."""
    index = folder / INDEX
    read = listed_files(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    ours = weight_files(folder)
    if read != ours:
        names = " and ".join(", ".join(path.name for path in files) for files in (read, ours))
        raise MachineError(
            f"vLLM and transformers read different weights in {folder}: {names}. Move the others away, or use "
            f"--set sample.engine=transformers."
        )


def _run_worker(
    models: list[Model], requests: list[Request], sampling: Sampling, options: EngineOptions
) -> list[list[list[int]]]:
    body = {
        "models": [
            {
                "path": str(model.path.resolve()),
                "max_length": model.max_length,
                "stop_token_ids": model.stop_token_ids,
                "kv_cache_bytes": kv_cache_bytes(model, options),
                "adapter": None if model.adapter is None else str(model.adapter.resolve()),
                "max_lora_rank": None if model.adapter is None else lora_rank(model.adapter),
            }
            for model in models
        ],
        "requests": [{"prompt_ids": request.prompt_ids, "seed": request.seed} for request in requests],
        "sampling": asdict(sampling),
        "options": asdict(options),
    }
    temporary = Path(tempfile.gettempdir())
    remove_abandoned(temporary, PREFIX)
    folder = temporary / f"{PREFIX}{temporary_suffix()}"
    folder.mkdir(mode=0o700)  # prompts are for nobody else on this machine
    own = claim(folder)
    request_path, result_path, log_path = (
        folder / "request.json",
        folder / "result.json",
        folder / "worker.log",
    )
    try:
        write_bytes(request_path, json.dumps(body).encode())
        code = _wait_for_worker(request_path, result_path, log_path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        own.release()  # a folder without an owner's file, as that of a worker that failed, stays for a day
    if code != 0 or not result_path.is_file():
        raise MachineError(
            f"vLLM stopped with exit code {code}: {failure_cause(log_path.read_text(errors='replace'))} (whole log: {log_path}). Fix that, or "
            f"sample without vLLM: --set sample.engine=transformers"
        )
    completions = read_json(result_path)["completions"]
    shutil.rmtree(folder, ignore_errors=True)
    return completions


def _wait_for_worker(request_path: Path, result_path: Path, log_path: Path) -> int:
    """Exit code of the worker; when this returns or raises, nothing of its process group is left."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}
    command = [sys.executable, "-m", "stages.generation.vllm_worker", str(request_path), str(result_path)]
    with open(log_path, "wb") as log:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        return worker.wait()
    except BaseException:
        _signal_group(worker.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(TERMINATE_SECONDS)
        raise
    finally:
        _signal_group(worker.pid, signal.SIGKILL)
        worker.wait()
        if worker.stdin:
            worker.stdin.close()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def failure_cause(log: str) -> str:
    """The cause of a failure in one line, from the end of a worker's log: its last exceptions, else its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [found[0] for line in lines if VLLM_SYMPTOM not in line and (found := EXCEPTION.search(line))]
    shown = list(dict.fromkeys(causes))[-LAST_CAUSES:] or lines[-LAST_LINES:]
    return " | ".join(shown)[-LAST_CHARACTERS:] or "it wrote nothing"
