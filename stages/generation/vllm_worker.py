"""The process that runs vLLM: `python -m stages.generation.vllm_worker REQUEST.json RESULT.json`.

In:  models, prompts as token ids, seeds, sampling and engine options (written by `stages.generation.vllm_process`).
Out: the token ids of every completion, for each model, written whole or not at all.

Several models are served one after the other, each by a new engine. Reloading the weights into a running
engine (`reload_weights`) would save 3 seconds and is wrong on a CPU: with tied embeddings vLLM 0.32
keeps computing logits with the old output matrix (0.4 nats off).
"""

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from cache.files import read_json, write_bytes


def main(request_path: Path, result_path: Path) -> None:
    """Generate the completions of every model and write them."""
    _die_with_parent()
    request = read_json(request_path)
    _set_environment()
    completions = []
    for model in request["models"]:
        completions.append(_complete(model, request))
        gc.collect()  # the engine is in reference cycles, and the next one needs its memory
    write_bytes(result_path, json.dumps({"completions": completions}).encode())


def _complete(model: dict[str, Any], request: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    options, sampling = request["options"], request["sampling"]
    if current_platform.is_cpu():
        # Compiling for a CPU takes longer than most sampling runs; memory not given is 92 % of the machine's.
        device: dict[str, Any] = {"kv_cache_memory_bytes": model["kv_cache_bytes"], "enforce_eager": True}
    else:
        device = {
            "gpu_memory_utilization": options["gpu_memory_utilization"],
            "enforce_eager": options["enforce_eager"],
        }
    lora = None
    if model["adapter"] is not None:
        lora = LoRARequest("adapter", 1, model["adapter"])
        device |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": model["max_lora_rank"]}
    llm = LLM(
        model=model["path"],
        # "auto" would take files in Mistral's own format where there are any.
        load_format="safetensors",
        config_format="hf",
        trust_remote_code=options["trust_remote_code"],
        dtype=options["dtype"],
        max_model_len=model["max_length"],
        tensor_parallel_size=options["tensor_parallel_size"],
        generation_config="vllm",
        skip_tokenizer_init=True,
        **device,
    )
    parameters = [
        SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            max_tokens=sampling["max_tokens"],
            seed=row["seed"],
            stop_token_ids=model["stop_token_ids"],
            # The list above has every end token, so vLLM need not look for more in the folder.
            ignore_eos=True,
            detokenize=False,
        )
        for row in request["requests"]
    ]
    prompts = [TokensPrompt(prompt_token_ids=row["prompt_ids"]) for row in request["requests"]]
    outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=lora)
    return [list(output.outputs[0].token_ids) for output in outputs]


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


def _die_with_parent() -> None:
    """Kill this process group once standard input closes, which it does when the parent is gone.

    Only if this process leads the group: otherwise, started by hand, it would kill the shell too.
    """

    def wait() -> None:
        # Not sys.stdin: a thread blocked in it would hold a lock that the interpreter wants at exit.
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if os.getpgrp() == os.getpid():
        threading.Thread(target=wait, daemon=True).start()


# vLLM starts its own workers by importing this module again.
if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
