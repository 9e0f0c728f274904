"""Every kind of attention and position that transformers' decoders have, scored as the model alone does.

The whole table over all architectures is `benchmarks/architectures.py`; here is one of each kind. What is true comes
from transformers: a fresh copy of the model, eager, one row at a time, fed the whole row.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import flex_attention as torch_flex_attention

from cache.errors import DataError, UsageError
from stages.engine import flex_attention
from stages.engine.pack_check import checked_logps, longest_example
from stages.engine.packs import build_pack, part_of
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute
from tests.stages.engine import tiny_architectures as tiny

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 4096)
# flex attention fills its packs up to the token budget, and on a CPU it computes all pairs of positions.
SHORT = replace(FLOAT32, tokens_per_batch=128)
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "architectures.json"
ROWS = tiny.make_rows()
GROUPS = [ROWS.example_rows(example, mismatched=False) for example in range(ROWS.num_examples)]
# How each is scored; "short": rows up to the first threshold in packs, longer ones alone, or "padded" if said so.
PACKED = {
    "llama/plain": "packed",
    "llama/yarn": "packed",
    "llama/longrope": "short",
    "llama/dynamic": "short",
    "phi3/longrope": "short",
    "gemma3_text/longrope": "short",  # rotary factors for each type of layer
    "dbrx/dynamic": "short",  # its configuration has another name for the length
    "qwen2_moe/windows": "short, padded",  # windows in the mask alone
    "phimoe/windows": "short, padded",
    "mistral/plain": "packed",
    "gemma2/plain": "packed",  # soft caps, which sdpa leaves out
    "cohere2/plain": "packed",  # layers without positions
    "phi/plain": "packed",  # partial rotary
    "olmoe/plain": "packed",
    "granite/tied": "packed",
    "gpt_oss/plain": "packed",  # sinks
    "granite_swa/plain": "packed",  # sinks and windows
    "afmoe/plain": "packed",
    "llama4_text/plain": "packed",  # chunks
    "deepseek_v3/plain": "packed",  # MLA
    "deepseek_v3/longrope": "short",
    "bloom/plain": "padded",  # ALiBi
    "falcon/alibi": "padded",
    "gpt_neo/plain": "padded",  # windows in a buffer
    "mamba/plain": "padded",
    "qwen3_next/plain": "padded",  # a recurrence in three of four layers, experts
    "recurrent_gemma/plain": "padded",
    "bamba/dynamic": "alone",
    "deepseek_v32/plain": "alone",  # a choice of positions
    "bert/decoder": "alone",
}
REFUSED = (
    "bert/plain",
    "xlm/plain",
    "xlnet/plain",
    "cpmant/plain",
    "gemma3_text/bidirectional",
    "big_bird/block sparse",
)


def model_of(name: str, attention: str) -> Any:
    kind, _, feature = name.partition("/")
    return tiny.build(tiny.build_config(kind, **tiny.features(kind)[feature]), attention)


@cache
@torch.no_grad()
def truth_of(name: str) -> torch.Tensor:
    """Log-probs of each row by itself, one after the other, float64."""
    model = model_of(name, tiny.TRUTH.get(name, "eager"))
    return torch.cat([tiny.alone(model, ROWS, row) for row in range(len(ROWS))])


def gradient_groups(name: str) -> list[np.ndarray]:
    """The rows whose gradients are taken: of mamba, which has no threshold and goes token by token, the short ones."""
    return GROUPS[1::2] if name == "mamba/plain" else GROUPS


@cache
def true_gradients(name: str) -> dict[str, torch.Tensor]:
    """Of the sum of these log-probs, by the names of the parameters."""
    model = model_of(name, "eager")
    for row in np.concatenate(gradient_groups(name)):
        with_gradient(model, row).sum().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def scored(scorer: Scorer, groups: list[np.ndarray]) -> torch.Tensor:
    return scorer(build_pack(ROWS, groups)).completion_logps


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_log_probs_are_those_of_each_row_alone(name: str) -> None:
    said: list[str] = []
    with torch.no_grad():
        wanted = truth_of(name)
        scorer = Scorer(model_of(name, "sdpa"), FLOAT32, said.append)
        found = scored(scorer, GROUPS)
        backwards = scored(scorer, GROUPS[::-1])
    assert name_of(scorer.way) == PACKED[name], said
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
    sizes = [int(ROWS.completion_lengths[group].sum()) for group in GROUPS[::-1]]
    torch.testing.assert_close(torch.cat(backwards.split(sizes)[::-1]), found, rtol=0, atol=2e-5)


def name_of(way: Way) -> str:
    unpacked = "padded" if way.padded else "alone"
    if way.backend is None:
        return unpacked
    short = "short, padded" if way.padded else "short"
    return "packed" if way.longest is None else short


@pytest.mark.parametrize("name", REFUSED)
def test_what_sees_later_tokens_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"causal.*decoder"):
        Scorer(model_of(name, "sdpa"), FLOAT32, print)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss/plain", "llama4_text/plain", "deepseek_v3/plain"])
def test_flex_attention_has_the_sinks_chunks_and_value_widths_of_tree_attention(
    name: str, monkeypatch
) -> None:
    """The GPU's way, forward on a CPU; that Dynamo can trace its masks and scores is tested in test_scorer.py."""
    monkeypatch.setattr(torch_flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    said: list[str] = []
    with torch.no_grad():
        scorer = Scorer(model_of(name, "sdpa"), SHORT, said.append, backends=[flex_attention.NAME])
        assert scorer.way.backend == flex_attention.NAME, said
        assert scorer.way.longest is None
        torch.testing.assert_close(scored(scorer, GROUPS).double(), truth_of(name), rtol=0, atol=2e-5)


# Both sides of a threshold; padded batches, with a recurrence and without; sinks, whose scores are trained; chunks; MLA.
WITH_GRADIENT = ("llama/longrope", "llama/dynamic", "qwen2_moe/windows", "mamba/plain", "bloom/plain")
WITH_GRADIENT += ("gpt_oss/plain", "llama4_text/plain", "deepseek_v3/plain")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_GRADIENT)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_gradients_of_a_pack_are_those_of_the_rows_alone(name: str, checkpointing: bool) -> None:
    """Checkpointed layers run again in the backward pass, after other rows went through them another way."""
    wanted = true_gradients(name)
    scorer = Scorer(model_of(name, "sdpa"), FLOAT32, print, checkpointing)
    scored(scorer, gradient_groups(name)).sum().backward()
    for key, parameter in scorer.model.named_parameters():
        if key in wanted:
            scale = wanted[key].abs().max()
            assert (parameter.grad - wanted[key]).abs().max() <= 5e-5 * scale + 1e-7, key


def with_gradient(model: Any, row: int) -> torch.Tensor:
    """Log-probs of a row by a model whose rotary factors are those of a new one."""
    for module in model.modules():
        if getattr(module, "rope_type", "") in ("longrope", "dynamic"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()
    prompt, completion = ROWS.prompt(row), ROWS.completion(row)
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]


@pytest.mark.slow
def test_a_row_has_the_same_log_probs_whatever_long_rows_are_packed_with_it() -> None:
    """To the bit, as without special lengths: how a row is scored is a function of its own length."""
    with torch.no_grad():
        scorer = Scorer(model_of("llama/longrope", "sdpa"), FLOAT32, print)
        together = scored(scorer, GROUPS)
        apart = torch.cat([scored(scorer, [group]) for group in GROUPS])
    assert torch.equal(together, apart)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom/plain", "mamba/plain", "qwen3_next/plain", "gpt_neo/plain"])
def test_a_row_has_the_same_log_probs_whatever_rows_share_its_batch(name: str) -> None:
    """To the bit, as in packs: with other examples, alone in its example, within another token budget."""
    with torch.no_grad():
        scorer = Scorer(model_of(name, "sdpa"), FLOAT32, print)
        together = scored(scorer, GROUPS)
        apart = torch.cat([scored(scorer, [np.array([row])]) for group in GROUPS for row in group])
        scorer.compute = replace(FLOAT32, tokens_per_batch=600)
        smaller = scored(scorer, GROUPS)
    assert scorer.way.padded
    assert torch.equal(together, apart)
    assert torch.equal(together, smaller)


@pytest.mark.parametrize("with_prompts", [False, True], ids=["completions", "and prompts"])
def test_parts_of_a_pack_score_its_tokens_once_each(with_prompts: bool) -> None:
    pack = build_pack(ROWS, GROUPS, with_prompts)
    random = np.random.default_rng(0)
    kept = random.random(len(pack.rows)) < 0.5
    parts = [part_of(pack, mask) for mask in (kept, ~kept)]
    for part, tokens, prompt_tokens in parts:
        own = torch.cat([tokens, prompt_tokens])
        assert torch.equal(part.targets, pack.targets[own])
        for ids in ("input_ids", "position_ids"):
            assert torch.equal(
                getattr(part, ids)[0][part.predictors], getattr(pack, ids)[0][pack.predictors[own]]
            )
        assert torch.equal(
            torch.from_numpy(part.rows)[part.token_rows], torch.from_numpy(pack.rows)[pack.token_rows[tokens]]
        )
    (_, tokens, prompts), (_, others, other_prompts) = parts
    assert torch.equal(tokens, ~others)
    assert torch.equal(prompts, ~other_prompts)


def test_a_model_with_a_nan_is_refused_with_the_layer_it_begins_in() -> None:
    model = model_of("llama/plain", "sdpa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(DataError, match=r"not finite, from model\.layers\.1\.mlp\.up_proj on"):
        Scorer(model, FLOAT32, print)


def test_rows_longer_than_any_length_known_are_compared_with_themselves_alone() -> None:
    """A threshold under a name that nothing is known of: the self-check passes, real rows do not."""
    scorer = Scorer(model_of("llama/plain", "sdpa"), FLOAT32, print)
    attention = scorer.model.model.layers[1].self_attn
    original = attention.forward

    def sees_less_of_packs(hidden_states: torch.Tensor, *args: Any, tree: Any = None, **kwargs: Any) -> Any:
        output, weights = original(hidden_states, *args, **kwargs, **({"tree": tree} if tree else {}))
        return (output * (1.0 if tree is None or hidden_states.shape[1] < 100 else 0.9)), weights

    attention.forward = sees_less_of_packs
    assert longest_example(ROWS) == 2
    with pytest.raises(UsageError, match=r"in a pack and -?\d+\.\d+ alone"):
        checked_logps(scorer, ROWS, 2)
    assert checked_logps(scorer, ROWS, 3)[1] < 2e-5


def test_the_table_over_all_architectures_is_complete_and_right() -> None:
    """`benchmarks/results/architectures.json`: every architecture, none off by more than rounding."""
    table = json.loads(RESULTS.read_text())
    if table["versions"]["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {table['versions']['transformers']}")
    kinds = {row["name"].split("/")[0] for row in table["rows"]}
    assert kinds == set(tiny.KINDS)
    wrong = [
        row["name"]
        for row in table["rows"]
        if row["way"] != "not built" and not row.get("difference", 0) <= 1e-4
    ]
    assert wrong == []
