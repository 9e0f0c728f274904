"""Models that cannot be packed: right-padded batches beside one completion at a time, and two builds beside each other.

In: a folder with `pairs/hh_harmless_base_test.jsonl.gz` and `tokenizers/olmo2_dolma2`, and the folder of another build
(a git worktree). Random models of layers that a pack cannot hold, on pairs of hh-rlhf of up to 512 tokens. Out:
`results/padded_fallback.json` and `.md`. Run from the repository root:

    git worktree add ../before COMMIT
    python benchmarks/padded_fallback.py --data FOLDER --other ../before
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.prefix_tree import VOCABULARY, hh, row_set
from benchmarks.two_builds import allocated_at_most, compare, seconds

# A shape is layers and width; a case is a model type, its shape, and pairs.
CASES = {
    "mamba 2 x 64": ("mamba", 2, 64, 8),
    "bloom 2 x 64": ("bloom", 2, 64, 32),
    "bloom 16 x 512": ("bloom", 16, 512, 8),
    "qwen3_next 4 x 64": ("qwen3_next", 4, 64, 8),
}
NOTES = (
    f"Random weights, {VOCABULARY:,} ids, pairs of hh-rlhf of up to 512 tokens, compute.tokens_per_batch at its default. `forward` is "
    "the work of cache-ref on these pairs, `step` that of a step of simpo on all of them, without the optimizer. `way` is that "
    "of this build. `memory` is the most that tensors take in a step beside weights and gradients, in MiB."
)


def measure(case: str, data: Path) -> dict[str, Any]:
    """The figures of a case by the build that is imported."""
    import torch

    from stages.engine.row_logps import score_groups
    from stages.engine.scorer import Scorer
    from stages.losses import parse_loss
    from stages.runtime.compute import resolve_compute
    from stages.runtime.distributed import World
    from stages.runtime.malloc import keep_freed_memory
    from stages.settings.fields import ComputeSettings
    from stages.train.step.row_scorer import RowScorer
    from stages.train.step.step import accumulate_step

    torch.set_num_threads(1)
    keep_freed_memory()
    kind, layers, width, pairs = CASES[case]
    rows = row_set(hh(data, pairs), ("chosen", "rejected"))
    compute = resolve_compute(ComputeSettings(device="cpu", dtype="float32"))
    scorer = Scorer(model_of(kind, layers, width), compute, lambda line: None)
    groups = [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    loss = parse_loss({"name": "simpo"})
    row_scorer = RowScorer(scorer, rows, None, loss, World())

    def forward(groups: list[Any] = groups) -> None:
        with torch.inference_mode():
            score_groups(scorer, rows, groups)

    def step() -> None:
        accumulate_step(row_scorer, loss, range(len(groups)), {})

    forward(groups[:1])
    found = {"examples": len(groups), "forward": seconds(forward), "step": seconds(step)}
    way = "padded" if getattr(scorer.way, "padded", False) else "alone"
    return {**found, "memory": allocated_at_most(step), "way": "packed" if scorer.packed else way}


def model_of(kind: str, layers: int, width: int) -> Any:
    """A random model of a type."""
    import torch
    import transformers

    common = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32, "head_dim": 32}
    recurrent = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    recurrent |= {"linear_num_key_heads": width // 32, "linear_num_value_heads": width // 32}
    dense = {"intermediate_size": 4 * width, "num_experts": 0, "decoder_sparse_step": 1}
    options = {
        "mamba": {},
        "bloom": {"n_head": width // 32, "n_layer": layers},
        "qwen3_next": {**heads, **recurrent, **dense, "mlp_only_layers": list(range(layers))},
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **common, **options[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    compare(__doc__, __file__, CASES, measure, "Models that cannot be packed", NOTES)
