"""`compute.compile`: a DPO step with the layers compiled beside one without, in the same process, in turn.

In: a folder as `engine_world.py` describes. Out: `results/compiled_layers.json` and `.md`. Run from the repository root:

    python benchmarks/compiled_layers.py --data FOLDER
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.engine_worker import Ours, batches
from benchmarks.engine_world import SHAPE, Work, build_world, data_folder
from benchmarks.record import write_results
from stages.runtime.compute import multiplies_bfloat16

ROUNDS, PAIRS = 7, 8
# Layers and sizes: the model of `engine.py`, and two layers as wide as those of a 1B model.
SHAPES = {
    "16 layers of width 512": SHAPE,
    "2 layers of width 2048": {
        **SHAPE,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}


def main() -> None:
    data = data_folder(__doc__)
    torch.set_num_threads(2)
    dtypes = ["float32", *(["bfloat16"] if multiplies_bfloat16(torch.cpu.get_capabilities()) else [])]
    rows = [measured(data, name, dtype) for dtype in dtypes for name in SHAPES]
    write_results(
        "compiled_layers",
        rows,
        "Layers compiled by torch.compile",
        f"DPO on hh-rlhf, max_length 512, {PAIRS} pairs a step, random OLMo-2, 32,000 ids; pairs a second of forward and backward pass and "
        f"optimizer, with `compute.compile` and without, in turn, medians of {ROUNDS} rounds. `first_step` is the seconds of the first "
        f"step, compilation included (torch keeps what it compiled on the disk: later runs begin sooner). `loss_difference`: the "
        f"largest difference of a step's loss between the two. bfloat16 is measured where the processor multiplies it.",
    )


def measured(data: Path, name: str, dtype: str) -> dict[str, Any]:
    """The row of a model and a dtype."""
    work = Work("ours", "dpo", dtype, "hh", 512, 32_000, PAIRS, ROUNDS, str(data))
    world = build_world(data, work.dataset, work.max_length, work.vocabulary)
    world = replace(world, model_folder=model_folder(world.model_folder, name))
    systems = Ours(work, world), Ours(work, world, compiled=True)
    warm_up, *steps = batches(world, work, "random")
    first = [timed(system, warm_up)[0] for system in systems]
    plain, compiled = zip(*([timed(system, step) for system in systems] for step in steps), strict=True)
    ratios = [before / after for (before, _), (after, _) in zip(plain, compiled, strict=True)]
    row = {
        "name": f"{name}, {dtype}",
        "plain": PAIRS / statistics.median(seconds for seconds, _ in plain),
        "compiled": PAIRS / statistics.median(seconds for seconds, _ in compiled),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "first_step_plain": first[0],
        "first_step_compiled": first[1],
        "loss_difference": max(
            abs(before - after) for (_, before), (_, after) in zip(plain, compiled, strict=True)
        ),
    }
    print(row, flush=True)
    return row


def timed(system: Ours, examples: list[int]) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    began = time.perf_counter()
    loss = system.run(examples)
    return time.perf_counter() - began, loss


def model_folder(first: Path, name: str) -> Path:
    """The folder of a model of this shape, with random weights."""
    if SHAPES[name] == SHAPE:
        return first
    from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config

    folder = first.with_name(f"{first.name}-{name.replace(' ', '-')}")
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(first)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Olmo2Config(vocab_size=32_000, **SHAPES[name]))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
