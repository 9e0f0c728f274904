"""The engine against the models' own logits: values, gradients, packings, architectures."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine import flex_attention, tree_attention
from stages.engine.packs import build_pack
from stages.engine.prefix_tree import Run, TreeIndex
from stages.engine.scorer import Scorer
from stages.engine.self_check import Way
from stages.runtime.compute import Compute

VOCABULARY = 97
FLOAT32 = Compute(torch.device("cpu"), torch.float32, 2048)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each architecture adds: grouped heads everywhere; norms after attention (OLMo-2), per-head norms
# (Qwen3), soft-capped scores and logits with alternating windows (Gemma-2), windows with two rotary
# bases (Gemma-3), fused projections (Phi-3), layers without positions (SmolLM3), windows (Mistral),
# experts (Mixtral), a tied and scaled head (Granite).
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 5}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "tie_word_embeddings": True}),
}


def make_model(name: str) -> torch.nn.Module:
    """A random model of an architecture, with weights large enough for peaked distributions."""
    config_name, extra = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**{**SMALL, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    return model.eval()


def make_rows() -> RowSet:
    """Five examples: a pair, a single completion of one token, a ranked list of four, and two that begin like the last.

    One goes on from a completion of the list, as the next turn of a dialogue does. Its completions begin alike, two are
    one, and one is the beginning of another.
    """
    random = np.random.default_rng(3)

    def draw(length: int) -> np.ndarray:
        return random.integers(3, VOCABULARY, length).astype(np.int32)

    made = [
        (draw(prompt), [draw(k) for k in lengths])
        for prompt, lengths in [(11, (7, 4)), (3, (1,)), (19, (2, 13, 5, 1))]
    ]
    listed, answers = made[-1]
    begun = draw(9)
    made.append(
        (
            np.concatenate([listed, answers[1], draw(6)]),
            [np.concatenate([begun, draw(3)]), begun, begun[:4], begun, draw(5)],
        )
    )
    made.append((np.concatenate([listed[:14], draw(2)]), [draw(6), draw(2)]))
    examples = [
        Example(str(n), f"made:{n}", prompt, [Row("ranked", ids, np.ones(len(ids), bool)) for ids in rows])
        for n, (prompt, rows) in enumerate(made)
    ]
    return RowSet([to_table(examples, [0] * len(examples))])


def groups_of(rows: RowSet) -> list[np.ndarray]:
    return [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]


def expected_logps(model: torch.nn.Module, rows: RowSet, row: int) -> torch.Tensor:
    """Log-probs of one row by a forward pass of its own, from the model's logits, in float64."""
    prompt, completion = rows.prompt(row), rows.completion(row)
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(1, ids[0, len(prompt) :, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_scores_and_gradients_are_those_of_separate_forwards(name: str) -> None:
    model, rows = make_model(name), make_rows()
    separate = [expected_logps(model, rows, row) for row in range(len(rows))]
    weights = torch.linspace(0.5, 1.5, len(rows))
    sum(weight * logps.sum() for weight, logps in zip(weights, separate, strict=True)).backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    said: list[str] = []
    scorer = Scorer(model, FLOAT32, said.append)
    assert scorer.packed, said
    pack = build_pack(rows, groups_of(rows))
    found = scorer(pack).completion_logps
    torch.testing.assert_close(found.double(), torch.cat(separate).detach(), rtol=0, atol=2e-5)
    (found * weights[pack.token_rows]).sum().backward()
    for key, parameter in model.named_parameters():
        if key in wanted:
            scale = wanted[key].abs().max()
            assert (parameter.grad - wanted[key]).abs().max() <= 2e-5 * scale + 1e-7, key


def prompts_apart(model: torch.nn.Module, rows: RowSet) -> torch.Tensor:
    """Log-probs of each prompt's tokens from the second on, by a forward pass of its own, in float64."""
    found = []
    for group in groups_of(rows):
        ids = torch.from_numpy(rows.prompt(group[0]).astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(torch.log_softmax(logits.double(), -1).gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("way", ["packed", "padded", "alone"])
def test_prompts_are_scored_once_and_as_in_separate_forwards(way: str) -> None:
    """Every way of the engine; the completions' log-probs, and their collisions, are what they are without."""
    model, rows = make_model("llama"), make_rows()
    wanted = prompts_apart(model, rows)
    weights = torch.linspace(0.5, 1.5, len(wanted))
    (wanted * weights).sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()

    scorer = Scorer(model, FLOAT32, print)
    if way != "packed":
        scorer.way = Way(attention="eager", padded=way == "padded")
    plain, pack = build_pack(rows, groups_of(rows)), build_pack(rows, groups_of(rows), with_prompts=True)
    found = scorer(pack, with_collisions=True)
    torch.testing.assert_close(found.prompt_logps.double(), wanted.detach(), rtol=0, atol=2e-5)
    without = scorer(plain, with_collisions=True)
    assert not len(without.prompt_logps)
    for name in ("completion_logps", "collision_logps"):
        torch.testing.assert_close(getattr(found, name), getattr(without, name), rtol=0, atol=2e-5)
    model.zero_grad()
    (found.prompt_logps * weights).sum().backward()
    for key, parameter in model.named_parameters():
        scale = gradients[key].abs().max()
        assert (parameter.grad - gradients[key]).abs().max() <= 2e-5 * scale + 1e-7, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "mistral", "smollm3"])
def test_flex_attention_sees_what_tree_attention_sees(name: str) -> None:
    """The block mask, soft-capped scores and sliding windows of the GPU's way, forward on a CPU."""
    model, rows = make_model(name), make_rows()
    with torch.no_grad():
        separate = torch.cat([expected_logps(model, rows, row) for row in range(len(rows))])
        said: list[str] = []
        # Packs are filled up to the token budget, and on a CPU all pairs of positions are computed.
        short = replace(FLOAT32, tokens_per_batch=128)
        scorer = Scorer(model, short, said.append, backends=[flex_attention.NAME])
        assert scorer.way.backend == flex_attention.NAME, said
        found = scorer(build_pack(rows, groups_of(rows))).completion_logps
    torch.testing.assert_close(found.double(), separate, rtol=0, atol=2e-5)


def test_flex_attention_has_no_backward_pass_on_a_cpu() -> None:
    """The reason why a CPU attends run by run: once this fails, it need not."""
    sides = [torch.randn(1, 2, 128, 16, requires_grad=True) for _ in range(3)]
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention.flex_attention(*sides)


def test_a_backend_that_fails_gives_way_to_the_next_and_says_so() -> None:
    """One completion a row is the last resort, not the second."""
    model, said = make_model("llama"), []
    scorer = Scorer(model, FLOAT32, said.append, backends=["no_such_attention", tree_attention.NAME])
    assert scorer.way.backend == tree_attention.NAME
    assert len(said) == 1
    assert "no_such_attention" in said[0]


def test_log_probs_do_not_depend_on_the_packing_to_the_bit() -> None:
    model, rows = make_model("llama"), make_rows()
    scorer = Scorer(model, FLOAT32, print)
    with torch.no_grad():
        together = scorer(build_pack(rows, groups_of(rows))).completion_logps
        alone = torch.cat([scorer(build_pack(rows, [group])).completion_logps for group in groups_of(rows)])
        backwards = scorer(build_pack(rows, groups_of(rows)[::-1])).completion_logps
    pieces = backwards.split([int(rows.completion_lengths[group].sum()) for group in groups_of(rows)[::-1]])
    assert torch.equal(together, alone)
    assert torch.equal(together, torch.cat(pieces[::-1]))


def long_rows() -> RowSet:
    """Rows of 400 to 700 tokens, beyond where calls and key blocks are cut, in a tree of three levels."""
    random = np.random.default_rng(5)

    def draw(length: int) -> np.ndarray:
        return random.integers(3, VOCABULARY, length).astype(np.int32)

    system, examples = draw(390), []
    for number in range(3):
        question = np.concatenate([system, draw(150), draw(17 * number)])
        answers = [draw(140), draw(5)]
        examples.append(
            Example(
                f"{number}",
                "made",
                question,
                [Row("ranked", ids, np.ones(len(ids), bool)) for ids in answers],
            )
        )
    return RowSet([to_table(examples, [0] * len(examples))])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "smollm3"])
def test_a_row_has_the_same_log_probs_to_the_bit_whatever_shares_its_tokens(name: str) -> None:
    """Alone, with what shares its prompt, and in a tree: the cached log-probs are those of any training step."""
    model, rows = make_model(name), long_rows()
    with torch.no_grad():
        wanted = torch.cat([expected_logps(model, rows, row) for row in range(len(rows))])
        scorer = Scorer(model, FLOAT32, print)
        together = scorer(build_pack(rows, groups_of(rows))).completion_logps
        alone = torch.cat(
            [scorer(build_pack(rows, [np.array([row])])).completion_logps for row in range(len(rows))]
        )
    assert torch.equal(together, alone)
    torch.testing.assert_close(together.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_gradients_of_long_rows_in_a_tree_are_those_of_separate_forwards(name: str) -> None:
    model, rows = make_model(name), long_rows()
    for row in range(len(rows)):
        expected_logps(model, rows, row).sum().backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    Scorer(model, FLOAT32, print)(build_pack(rows, groups_of(rows))).completion_logps.sum().backward()
    for key, parameter in model.named_parameters():
        scale = wanted[key].abs().max()
        assert (parameter.grad - wanted[key]).abs().max() <= 2e-5 * scale + 1e-7, key


def test_plain_sdpa_without_a_mask_hides_the_prompt_from_the_second_completion() -> None:
    """The trap that attention along the tree exists for: no error, and log-probs far from the truth."""
    model, rows = make_model("llama"), make_rows()
    pack = build_pack(rows, groups_of(rows)[:1])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        body = model.get_decoder()
        hidden = body(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False)
        logits = model.get_output_embeddings()(hidden.last_hidden_state[0][pack.predictors])
        trapped = torch.log_softmax(logits, -1).gather(1, pack.targets[:, None])[:, 0]
        model.set_attn_implementation("eager")
        first, second = (expected_logps(model, rows, row).float() for row in (0, 1))
    torch.testing.assert_close(trapped[:7], first, rtol=0, atol=2e-5)
    assert (trapped[8:] - second[1:]).abs().max() > 0.1


@pytest.mark.slow
def test_an_architecture_that_cannot_be_packed_is_scored_in_padded_batches_and_says_so() -> None:
    """A recurrent model has no attention to plug into; its numbers must still be its own."""
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    said: list[str] = []
    scorer = Scorer(model, FLOAT32, said.append)
    rows = make_rows()
    assert not scorer.packed
    assert len(said) == 1
    assert "in right-padded batches" in said[0]
    scorer.forwards = 0
    with torch.no_grad():
        found = scorer(build_pack(rows, groups_of(rows))).completion_logps
        wanted = torch.cat([expected_logps(model, rows, row) for row in range(len(rows))])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
    assert scorer.forwards == 4  # rows of 3 to 49 inputs are padded to 16, 32, 48 or 64


def test_a_model_that_looks_beyond_a_row_in_its_batch_is_scored_one_by_one() -> None:
    """A layer that mixes the rows of a batch, or sees the padding behind a row, passes as long as rows are alone."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
    ).eval()
    mixer = model.backbone.layers[0].mixer
    original = mixer.forward
    mixer.forward = lambda hidden, *args, **kwargs: (
        original(hidden, *args, **kwargs) + hidden.mean(0, keepdim=True) - hidden
        if len(hidden) > 1
        else original(hidden, *args, **kwargs)
    )
    said: list[str] = []
    scorer = Scorer(model, FLOAT32, said.append)
    assert scorer.way == Way(attention=scorer.way.attention)
    assert "one completion at a time" in said[0]


def test_a_model_that_lies_about_its_attention_is_caught_by_the_self_check() -> None:
    """A layer that quietly ignores the tree makes packed scores wrong, not failing."""
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward
    attention.forward = lambda *args, tree=None, **kwargs: original(
        *args, **kwargs, tree=None if tree is None else TreeIndex([Run(0, 0, tree.size)])
    )
    said: list[str] = []
    assert not Scorer(model, FLOAT32, said.append).packed
    assert "differ" in said[0]


def test_bfloat16_autocast_keeps_float32_log_probs() -> None:
    """Log-probs come back in float32, off by bfloat16's rounding of the logits and no more."""
    model, rows = make_model("llama"), make_rows()
    pack = build_pack(rows, groups_of(rows))
    with torch.no_grad():
        exact = Scorer(model, FLOAT32, print)(pack).completion_logps
        rounded = Scorer(model, Compute(FLOAT32.device, torch.bfloat16, 2048), print)(pack).completion_logps
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.5
    assert not torch.equal(rounded, rounded.bfloat16().float())


@pytest.mark.slow
def test_weights_cast_once_for_many_packs_give_the_gradient_of_weights_cast_for_each() -> None:
    """And new weights are cast anew: a copy that outlived the step would score with the old ones."""
    model, rows = make_model("llama"), make_rows()
    scorer = Scorer(model, Compute(FLOAT32.device, torch.bfloat16, 2048), print)
    packs = [build_pack(rows, [group]) for group in groups_of(rows)]
    gradients = []
    for keeping in (nullcontext, scorer.weights_cast_once):
        model.zero_grad()
        with keeping():
            for pack in packs:
                scorer(pack).completion_logps.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    with torch.no_grad():
        before = scorer(packs[0]).completion_logps
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(scorer(packs[0]).completion_logps, before)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient() -> None:
    rows = make_rows()
    gradients = []
    for checkpointing in (False, True):
        model = make_model("llama")
        Scorer(model, FLOAT32, print, checkpointing)(
            build_pack(rows, groups_of(rows))
        ).completion_logps.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
