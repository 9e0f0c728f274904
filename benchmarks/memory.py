"""How well `align plan` predicts memory: predicted against measured, for ways of training that differ in it.

In: nothing; a Llama of 53 million random weights, the quickstart's rows, packs of 1,024 tokens. Out: `results/memory.json` and
`.md`. Each row is `align plan --measure` in a process of its own. Run from the repository root:

    python benchmarks/memory.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_results
from pipeline.quickstart import Recipe, make_tokenizer

MIB = 1 << 20
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
FULL, LORA = {}, {"adapter": {"name": "lora"}}
CHECKPOINTED = {"gradient_checkpointing": True}
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "full": (FULL, {}, "float32"),
    "full, checkpointing": (FULL, CHECKPOINTED, "float32"),
    "full, bfloat16": (FULL, {}, "bfloat16"),
    "full, bfloat16, checkpointing": (FULL, CHECKPOINTED, "bfloat16"),
    "full, adamw_8bit": (FULL, {"optimizer": "adamw_8bit"}, "float32"),
    "full, adamw_bf16": (FULL, {"optimizer": "adamw_bf16"}, "float32"),
    "full, adafactor": (FULL, {"optimizer": "adafactor"}, "float32"),
    "LoRA": (LORA, {}, "float32"),
    "LoRA, checkpointing": (LORA, CHECKPOINTED, "float32"),
    "LoRA, bfloat16": (LORA, {}, "bfloat16"),
    "LoRA, bfloat16, checkpointing": (LORA, CHECKPOINTED, "bfloat16"),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model")
        rows = [row(name, model, Path(folder), *arm) for name, arm in ARMS.items()]
    notes = (
        "A Llama of 53 million random weights on the quickstart's pairs, packs of 1,024 tokens, one thread; MiB. `measured`: the most "
        "that lived in an optimizer step, with an allocator that gives freed memory back. `off`: predicted less measured, "
        "relative to measured. `held`: the process's peak as it trains, where the allocator keeps freed memory for speed."
    )
    write_results("memory", rows, "Memory, predicted and measured", notes)


def save_model(folder: Path) -> Path:
    """The shape with random weights, and the quickstart's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    make_tokenizer(Recipe()).save_pretrained(folder)
    return folder


def row(
    name: str, model: Path, folder: Path, blocks: dict[str, Any], train: dict[str, Any], dtype: str
) -> dict[str, Any]:
    config = folder / "run.yaml"
    tree = {
        "data": {"path": "quickstart"},
        "policy": {"model": str(model)},
        "prepare": {"mismatched": False},
        "compute": {"device": "cpu", "dtype": dtype, "tokens_per_batch": 1024},
        "train": train,
        **blocks,
    }
    config.write_text(yaml.safe_dump(tree))
    align("prepare", config, folder)
    plan = json.loads(align("plan", config, folder, "--measure"))
    predicted, measured = plan["predicted"], plan["measured"]
    peak = measured["peak_bytes"]
    found = {
        "name": name,
        **{
            kind: round(predicted[kind] / MIB)
            for kind in ("weights", "gradients", "optimizer", "activations")
        },
        "predicted": round(predicted["total"] / MIB),
        "measured": round(peak / MIB),
        "off": f"{(predicted['total'] - peak) / peak:+.1%}",
        "held": round(measured["held_bytes"] / MIB),
    }
    print(found, flush=True)
    return found


def align(command: str, config: Path, folder: Path, *options: str) -> str:
    call = [
        sys.executable,
        "-m",
        "pipeline",
        command,
        "-c",
        str(config),
        "--store",
        str(folder / "store"),
        "--json",
    ]
    return subprocess.run([*call, *options], cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
