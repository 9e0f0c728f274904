"""Runs vLLM in processes of its own, and leaves no memory, process or folder behind.

In:  models, requests (prompt ids, seeds, temperatures).  Out: the token ids of each completion, as they finish.

Only the exit of a process surely releases all that vLLM takes. A worker leads a process group; the group is killed
when the engine is closed or this process is interrupted, and it kills itself when this process dies (its standard input
is a pipe that only closes then), so there are no orphans even after `kill -9`.
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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cache.files import write_bytes
from cache.ownership import claim, remove_abandoned, temporary_suffix
from cache.safetensors import INDEX, listed_files, weight_files
from stages.generation.contract import EngineError, EngineName
from stages.generation.requests import EngineOptions, Model, Request, Sampling
from stages.models.adapters import adapter_config

MIN_KV_CACHE_BYTES = 512 << 20
MIN_FULL_SEQUENCES = 2
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
TERMINATE_SECONDS = 5
POLL_SECONDS = 0.05
PREFIX = "align-vllm-worker."
# pydantic, which vLLM validates with, puts the cause on a line of its own.
EXCEPTION = re.compile(r"[\w.]+(Error|Exception)(: .*|$)|Value error, .*")
VLLM_SYMPTOM = "Engine core initialization failed"
LAST_CAUSES = 2
LAST_LINES = 3
LAST_CHARACTERS = 600


class VllmEngine:
    """vLLM in one worker process, or in `data_parallel_size` of them, each with a part of the requests."""

    name: EngineName = "vllm"

    def __init__(self) -> None:
        """No process is started yet."""
        self._workers: list[_Worker] = []
        self._loaded: dict[str, Any] | None = None

    def __enter__(self) -> "VllmEngine":
        """Remove what killed workers left."""
        remove_abandoned(Path(tempfile.gettempdir()), PREFIX)
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes and remove their folders."""
        self._stop()

    def complete(
        self, model: Model, requests: Sequence[Request], sampling: Sampling, options: EngineOptions
    ) -> Iterator[tuple[int, list[int]]]:
        """As `Engine.complete`; an `EngineError` names the cause and the log of the worker."""
        check_weight_files(model.path)
        self._prepare(_described(model, options), options.data_parallel_size)
        parts = [range(index, len(requests), len(self._workers)) for index in range(len(self._workers))]
        for worker, places in zip(self._workers, parts, strict=True):
            worker.begin(places, [requests[place] for place in places], sampling)
        try:
            while any(worker.is_busy for worker in self._workers):
                found = [pair for worker in self._workers for pair in worker.finished()]
                yield from found
                if not found:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop()
            raise

    def _prepare(self, loaded: dict[str, Any], number: int) -> None:
        """Start the workers, or keep those that run.

        On a CPU one process can run one model after the other: 3 to 4 seconds instead of a whole start. On CUDA, and with
        several devices, only the exit frees the memory that the next one needs.
        """
        import torch

        can_change = not torch.cuda.is_available() and loaded["tensor_parallel_size"] == 1
        if len(self._workers) != number or (self._loaded != loaded and not can_change):
            self._stop()
            devices = loaded["tensor_parallel_size"]
            for index in range(number):
                self._workers.append(_Worker(_visible(index, devices) if number > 1 else None))
        self._loaded = loaded
        for worker in self._workers:
            worker.loaded = loaded

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers, self._loaded = [], None


def _visible(index: int, number: int) -> str | None:
    """The devices of the worker at `index`, `number` of them, as a value of CUDA_VISIBLE_DEVICES; None without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(device) for device in range(torch.cuda.device_count())]
    own = devices[index * number : (index + 1) * number]
    if len(own) < number:
        raise EngineError(
            f"Worker {index + 1} of sample.data_parallel needs {number} GPUs of its own, and {len(devices)} are visible. "
            f"Lower sample.data_parallel or sample.tensor_parallel."
        )
    return ",".join(own)


def _described(model: Model, options: EngineOptions) -> dict[str, Any]:
    """What a worker loads; plain data."""
    return {
        "path": str(model.path.resolve()),
        "max_length": model.max_length,
        "stop_token_ids": model.stop_token_ids,
        "kv_cache_bytes": kv_cache_bytes(model, options),
        "adapter": None if model.adapter is None else str(model.adapter.resolve()),
        "max_lora_rank": None if model.adapter is None else lora_rank(model.adapter),
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": options.enforce_eager,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "trust_remote_code": options.trust_remote_code,
    }


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
    """The smallest of vLLM's LoRA ranks that fits this adapter; raises `EngineError` for an adapter that vLLM cannot run."""
    config = adapter_config(adapter)
    ranks = [rank for rank in LORA_RANKS if rank >= config["r"]]
    if config.get("use_dora") or not ranks:
        limit = (
            "no DoRA adapters"
            if config.get("use_dora")
            else f"adapters up to rank {LORA_RANKS[-1]}, and this one has {config['r']}"
        )
        raise EngineError(
            f"vLLM runs {limit} ({adapter}). Sample with --set sample.engine=transformers, or run `align merge` with the "
            f"arguments of `align train` and sample the folder it names: --set sample.model=FOLDER"
        )
    return ranks[0]


def check_weight_files(folder: Path) -> None:
    """Raise `EngineError` if vLLM would read other files than transformers: without an index it reads all there are."""
    index = folder / INDEX
    read = listed_files(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    ours = weight_files(folder)
    if read != ours:
        names = " and ".join(", ".join(path.name for path in files) for files in (read, ours))
        raise EngineError(
            f"vLLM and transformers read different weights in {folder}: {names}. Move the others away, or use "
            f"--set sample.engine=transformers."
        )


class _Worker:
    """One process, its private folder, and the part of the requests that it works on."""

    def __init__(self, devices: str | None) -> None:
        self.loaded: dict[str, Any] = {}
        self.folder = Path(tempfile.gettempdir()) / f"{PREFIX}{temporary_suffix()}"
        self.folder.mkdir(mode=0o700)  # prompts are for nobody else on this machine
        self.own = claim(self.folder)
        self.log = self.folder / "worker.log"
        self.jobs, self.left, self.rest, self.failed = 0, 0, b"", False
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root]),
        }
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stages.generation.vllm_worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def is_busy(self) -> bool:
        return self.left > 0

    def begin(self, places: Sequence[int], requests: Sequence[Request], sampling: Sampling) -> None:
        """Give the process requests to complete."""
        self.jobs, self.left, self.rest = self.jobs + 1, len(requests), b""
        if not requests:
            return
        path = self.folder / f"job-{self.jobs}.json"
        rows = [
            {"place": place, "prompt_ids": one.prompt_ids, "seed": one.seed, "temperature": one.temperature}
            for place, one in zip(places, requests, strict=True)
        ]
        how = {"top_p": sampling.top_p, "top_k": sampling.top_k, "max_tokens": sampling.max_tokens}
        body = {"model": self.loaded, "requests": rows, "sampling": how}
        write_bytes(path, json.dumps(body).encode())
        self.answers = open(path.with_suffix(".jsonl"), "w+b")  # noqa: SIM115  closed when the job is done
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it has ended is seen while waiting for answers
            self.process.stdin.write(f"{path}\n".encode())
            self.process.stdin.flush()

    def finished(self) -> list[tuple[int, list[int]]]:
        """The completions that finished since the last call; raises `EngineError` if the process has ended."""
        if not self.is_busy:
            return []
        code = self.process.poll()
        *lines, self.rest = (self.rest + self.answers.read()).split(b"\n")
        found = [json.loads(line) for line in lines]
        self.left -= len(found)
        if not self.is_busy:
            self.answers.close()
        elif code is not None and not found:
            self.failed = True
            raise EngineError(
                f"vLLM stopped with exit code {code}: {failure_cause(self.log.read_text(errors='replace'))} (whole log: "
                f"{self.log}). Fix that, or sample without vLLM: --set sample.engine=transformers"
            )
        return [(place, ids) for place, ids in found]

    def stop(self) -> None:
        """End the process; when this returns or raises, nothing of its group is left. The log of a failure stays."""
        try:
            if self.process.poll() is None:
                _signal_group(self.process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(TERMINATE_SECONDS)
        finally:
            _signal_group(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.close()
            if not self.failed:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.own.release()  # a folder without an owner's file, as that of a worker that failed, stays for a day


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def failure_cause(log: str) -> str:
    """The cause of a failure in one line, from the end of a worker's log: its last exceptions, else its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [found[0] for line in lines if VLLM_SYMPTOM not in line and (found := EXCEPTION.search(line))]
    shown = list(dict.fromkeys(causes))[-LAST_CAUSES:] or lines[-LAST_LINES:]
    return " | ".join(shown)[-LAST_CHARACTERS:] or "it wrote nothing"
