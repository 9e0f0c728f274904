"""The process that runs vLLM: `python -m stages.generation.vllm_worker`, started by `stages.generation.vllm_process`.

In:  on standard input, paths of jobs: a model, how to sample, prompts as token ids with seeds and temperatures.
Out: beside each job, a line for every completion as it finishes: its place and its token ids.

A model stays loaded for the next job; another one is loaded into a new engine. Reloading the weights into a running
engine (`reload_weights`) would save 3 seconds and is wrong on a CPU: with tied embeddings vLLM 0.32
keeps computing logits with the old output matrix (0.4 nats off).
"""

import gc
import json
import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.files import read_json
from stages.runtime.offline import go_offline, is_offline


def main() -> None:
    """Work on jobs until the process is killed."""
    if is_offline():
        go_offline()
    jobs: queue.Queue[Path] = queue.Queue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    _set_environment()
    loaded: dict[str, Any] | None = None
    engine: Any = None
    while True:
        path = jobs.get()
        job = read_json(path)
        if job["model"] != loaded:
            engine = loaded = None
            gc.collect()  # the engine is in reference cycles, and the next one needs its memory
            engine, loaded = _load(job["model"]), job["model"]
        with open(path.with_suffix(".jsonl"), "ab", buffering=0) as answers:
            for answer in _complete(engine, job):
                answers.write(json.dumps(answer).encode() + b"\n")


def _load(model: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    # vLLM collects garbage five times while it loads, each time for half a second where its modules are looked through too.
    gc.freeze()
    if current_platform.is_cpu():
        # Compiling for a CPU takes longer than most sampling runs; memory not given is 92 % of the machine's.
        device: dict[str, Any] = {"kv_cache_memory_bytes": model["kv_cache_bytes"], "enforce_eager": True}
        # Where a prompt is processed in chunks, vLLM 0.32 rewinds the request's generator, which a CPU's cannot:
        # many seeded requests at once stopped the engine ("CPU Generator does not use offset").
        device |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, model["max_length"])}
    else:
        device = {
            "gpu_memory_utilization": model["gpu_memory_utilization"],
            "enforce_eager": model["enforce_eager"],
        }
    if model["adapter"] is not None:
        device |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": model["max_lora_rank"]}
    return LLM(
        model=model["path"],
        # "auto" would take files in Mistral's own format where there are any.
        load_format="safetensors",
        config_format="hf",
        trust_remote_code=model["trust_remote_code"],
        dtype=model["dtype"],
        max_model_len=model["max_length"],
        tensor_parallel_size=model["tensor_parallel_size"],
        generation_config="vllm",
        skip_tokenizer_init=True,
        **device,
    )


def _complete(llm: Any, job: dict[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """Yield place and token ids of each completion as it finishes, which `LLM.generate` keeps until the last."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    model, sampling = job["model"], job["sampling"]
    lora = None if model["adapter"] is None else LoRARequest("adapter", 1, model["adapter"])
    for row in job["requests"]:
        parameters = SamplingParams(
            **sampling,
            temperature=row["temperature"],
            seed=row["seed"],
            stop_token_ids=model["stop_token_ids"],
            # The list above has every end token, so vLLM need not look for more in the folder.
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=row["prompt_ids"])
        llm.llm_engine.add_request(str(row["place"]), prompt, parameters, lora_request=lora)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                yield int(output.request_id), list(output.outputs[0].token_ids)


def _set_environment() -> None:
    """Set the environment variables that vLLM reads while it is imported."""
    import torch

    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # A second process for the engine, which imports everything again, helps only on a GPU.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # This setting stops the engine on a CPU, where results do not depend on the batch anyway.
        os.environ.pop("VLLM_BATCH_INVARIANT", None)


def _read_jobs(jobs: "queue.Queue[Path]") -> None:
    """Queue the paths of jobs, and kill this process group once standard input closes, as it does when the parent is gone.

    Only if this process leads the group: otherwise, started by hand, it would kill the shell too.
    """
    rest = b""
    # Not sys.stdin: a thread blocked in it would hold a lock that the interpreter wants at exit.
    while data := os.read(0, 4096):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            jobs.put(Path(line.decode()))
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(0)


# vLLM starts its own workers by importing this module again.
if __name__ == "__main__":
    main()
