"""Adapters: exact at the start, the same through packs as through the model, saved so that others read them."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cache.errors import DataError, UsageError
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.models.adapters import (
    attach_adapter,
    base_of,
    check_adapter,
    halve_frozen_weights,
    is_adapter,
    load_adapter,
    save_adapter,
)
from stages.models.identity import model_identity
from stages.models.loading import ModelSource, load_model
from stages.runtime.compute import Compute
from stages.settings.train import AdapterSettings
from tests.tiny_llama import random_llama

pytestmark = [
    pytest.mark.slow,  # importing peft alone takes seconds
    pytest.mark.skipif(find_spec("peft") is None, reason="needs peft"),
]

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 4096)
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16, 4096)
KINDS = ["lora", "dora"]


def rows_of(vocabulary: int) -> RowSet:
    """Three examples with two or three completions each."""
    random = np.random.default_rng(3)

    def draw(length: int) -> np.ndarray:
        return random.integers(3, vocabulary, length).astype(np.int32)

    examples = [
        Example(
            str(number),
            "made",
            draw(prompt),
            [Row("ranked", draw(length), np.ones(length, bool)) for length in lengths],
        )
        for number, (prompt, lengths) in enumerate([(7, (5, 9)), (3, (4, 1, 6)), (11, (8, 2))])
    ]
    return RowSet([to_table(examples, [0, 0, 0])])


def score(model, compute=FLOAT32) -> torch.Tensor:
    rows = rows_of(model.config.vocab_size)
    scorer = Scorer(model, compute, print)
    assert scorer.packed
    pack = build_pack(rows, [np.arange(a, b) for a, b in zip(rows.starts, rows.ends, strict=True)])
    return scorer(pack).completion_logps


def by_the_model(adapted) -> torch.Tensor:
    """Token log-probs of the same rows, one sequence at a time, through peft's wrapper and its own forward."""
    rows = rows_of(adapted.config.vocab_size)
    found = []
    for row in range(len(rows)):
        ids = torch.from_numpy(np.concatenate([rows.prompt(row), rows.completion(row)]).astype(np.int64))
        logits = adapted(input_ids=ids[None]).logits[0].double()
        logps = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
        found.append(logps[-len(rows.completion(row)) :])
    return torch.cat(found)


def stir(adapted) -> None:
    """Give an adapter weights as after training: B and the magnitudes away from where they start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                scale = 0.05 if "magnitude" in name else 0.2
                parameter.add_(torch.randn_like(parameter) * scale)


def adapted_model(folder: Path, name: str, stirred: bool = True, **changes):
    source = ModelSource(str(folder), folder)
    model = load_model(source, FLOAT32)
    adapted = attach_adapter(model, AdapterSettings(name=name, r=4, **changes), 0, source)
    if stirred:
        stir(adapted)
    return model, adapted


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("compute", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_new_adapter_changes_no_log_prob(tiny_model, name, compute):
    bare = load_model(ModelSource(str(tiny_model), tiny_model), FLOAT32)
    with torch.no_grad():
        expected = score(bare, compute)
        model, _ = adapted_model(tiny_model, name, stirred=False)
        assert torch.equal(score(model, compute), expected)


@pytest.mark.parametrize("name", KINDS)
def test_packed_log_probs_with_an_adapter_equal_those_of_the_model(tiny_model, name):
    model, adapted = adapted_model(tiny_model, name)
    with torch.no_grad():
        packed = score(model)
        model.set_attn_implementation("sdpa")
        own = by_the_model(adapted)
        bare = score(load_model(ModelSource(str(tiny_model), tiny_model), FLOAT32))
    assert (packed - bare).abs().max() > 0.1
    assert (packed - own).abs().max() < 2e-5


def test_only_the_adapter_has_gradients(tiny_model):
    model, _ = adapted_model(tiny_model, "lora")
    score(model).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_frozen_weights_in_bfloat16_give_the_same_numbers_and_gradients(tiny_model):
    """As float32 masters under autocast, to the bit, at half the memory."""
    found = []
    for halved in (False, True):
        model, _ = adapted_model(tiny_model, "lora")
        rows = rows_of(320)
        scorer = Scorer(model, BFLOAT16, print)
        if halved:
            halve_frozen_weights(model)
            assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
            assert model.lm_head.weight.dtype == torch.float32  # tied to the embedding
        pack = build_pack(rows, [np.arange(a, b) for a, b in zip(rows.starts, rows.ends, strict=True)])
        logps = scorer(pack).completion_logps
        logps.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((logps.detach(), gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


def test_the_seed_determines_the_initial_adapter(tiny_model):
    def first(seed: int) -> torch.Tensor:
        source = ModelSource(str(tiny_model), tiny_model)
        adapted = attach_adapter(load_model(source, FLOAT32), AdapterSettings(name="lora"), seed, source)
        return next(parameter for parameter in adapted.parameters() if parameter.requires_grad)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("name", KINDS)
def test_peft_and_transformers_load_a_saved_adapter(tiny_model, name, tmp_path):
    _, adapted = adapted_model(tiny_model, name, use_rslora=True)
    save_adapter(adapted, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with torch.no_grad():
        expected = by_the_model(adapted)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        again = load_adapter(base, tmp_path)
        assert torch.equal(by_the_model(again), expected)
        merged = again.merge_and_unload()
        assert (by_the_model(merged) - expected).abs().max() < 2e-4
        if name == "dora":  # transformers 5.19 looks for the magnitudes under another name
            return
        by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(by_the_model(by_transformers), expected)


def test_an_adapter_folder_is_recognised_and_names_its_base(tiny_model, tmp_path):
    _, adapted = adapted_model(tiny_model, "lora")
    save_adapter(adapted, tmp_path)
    assert is_adapter(tmp_path)
    assert not is_adapter(tiny_model)
    source = ModelSource("adapter", tmp_path)
    assert base_of(source).folder == tiny_model
    before = model_identity(source)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    assert model_identity(source) != before
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/nowhere/base"})
    )
    with pytest.raises(DataError, match=r"trained on /nowhere/base, which does not exist"):
        base_of(source)


def test_missing_target_modules_are_named_before_weights_are_loaded(tiny_model):
    source = ModelSource(str(tiny_model), tiny_model)
    with pytest.raises(UsageError, match=r"c_attn.*down_proj, gate_proj"):
        check_adapter(AdapterSettings(name="lora", target_modules=("c_attn",)), source)
    check_adapter(AdapterSettings(name="lora", target_modules=("q_proj", "v_proj")), source)


def test_padded_heads_stay_a_valid_model(shared_data):
    """stories260K has heads padded with zeros; an adapter on q, k and v fills them, and packs still agree."""
    model, adapted = adapted_model(
        shared_data / "models/stories260K-hf-hd32", "lora", target_modules=("q_proj", "k_proj", "v_proj")
    )
    with torch.no_grad():
        packed = score(model)
        model.set_attn_implementation("sdpa")
        assert (packed - by_the_model(adapted)).abs().max() < 1e-4


def test_all_linear_excludes_the_output_layer(tiny_model, tmp_path):
    _, adapted = adapted_model(tiny_model, "lora")
    save_adapter(adapted, tmp_path)
    names = {name.split(".")[-3] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_over_4_bit_weights_has_the_gradients_over_the_dequantized_weights(tiny_model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = ModelSource(str(tiny_model), tiny_model)
    quantized = load_model(source, Compute(torch.device("cpu"), torch.float32, 4096, load_in_4bit=True))
    written_out = load_model(source, FLOAT32)
    layers = dict(quantized.named_modules())
    for name, module in written_out.named_modules():
        if isinstance(layers[name], bitsandbytes.nn.Linear4bit):
            weight = layers[name].weight
            module.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    found = []
    for model in (quantized, written_out):
        stir(attach_adapter(model, AdapterSettings(name="lora", r=4), 0, source))
        logps = score(model)
        logps.sum().backward()
        found.append((logps.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (logps, gradients), (expected_logps, expected) = found
    assert (logps - expected_logps).abs().max() < 1e-4
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-3 * wanted.norm()


def checked_and_attached(folder: Path, **changes) -> list:
    """Both ways to the same refusal: on shapes before anything is loaded, and on the loaded model."""
    source, settings = ModelSource(str(folder), folder), AdapterSettings(r=4, **changes)
    return [
        lambda: check_adapter(settings, source),
        lambda: attach_adapter(load_model(source, FLOAT32), settings, 0, source),
    ]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("q_proj", "lm_head"), ".*lm_head"])
def test_an_adapter_on_one_end_of_tied_weights_is_refused_before_training(tiny_model, name, targets):
    for attempt in checked_and_attached(tiny_model, name=name, target_modules=targets):
        with pytest.raises(UsageError, match=r"lm_head and model\.embed_tokens are one matrix"):
            attempt()


def test_merging_an_adapter_on_tied_weights_changes_both_ends_in_peft(tiny_model):
    """Why it is refused: the merged model is not base and adapter, and not by rounding."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="tie"):
        adapted = peft.get_peft_model(model, config)
    stir(adapted)
    with torch.no_grad(), pytest.warns(UserWarning, match="tie"):
        expected, merged = by_the_model(adapted), adapted.merge_and_unload()
    assert (by_the_model(merged) - expected).abs().max() > 0.1


def test_an_adapter_on_untied_ends_is_base_and_adapter_after_merging(tmp_path):
    random_llama(4, tie_word_embeddings=False).save_pretrained(tmp_path)
    check, _ = checked_and_attached(tmp_path, name="lora", target_modules=("lm_head", "embed_tokens"))
    check()
    _, adapted = adapted_model(tmp_path, "lora", target_modules=("lm_head", "embed_tokens"))
    with torch.no_grad():
        expected = by_the_model(adapted)
        assert (by_the_model(adapted.merge_and_unload()) - expected).abs().max() < 2e-4


@pytest.mark.parametrize("targets", ["all-linear", ("v_proj",)])
def test_dora_on_a_row_of_zeros_is_refused_naming_the_layer(tmp_path, targets):
    """peft divides 0 by 0 there, and every log-prob is NaN (findings/dora_on_a_row_of_zeros.sh)."""
    model = random_llama(4)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[8:16] = 0.0  # a padded head
    model.save_pretrained(tmp_path)
    message = r"model\.layers\.1\.self_attn\.v_proj has 8 rows of zeros.*adapter\.name=lora"
    with pytest.raises(UsageError, match=message):
        adapted_model(tmp_path, "dora", target_modules=targets)
    for name, others in (("lora", targets), ("dora", ("q_proj", "down_proj"))):
        model, _ = adapted_model(tmp_path, name, target_modules=others)
        with torch.no_grad():
            assert score(model).isfinite().all()


def test_dora_on_a_model_with_padded_heads_is_refused(shared_data):
    with pytest.raises(UsageError, match=r"self_attn\.\w_proj has \d+ rows of zeros"):
        adapted_model(shared_data / "models/stories260K-hf-hd32", "dora")


def test_dora_over_4_bit_weights_finds_the_rows_of_zeros_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = random_llama(4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] = 0.0
    model.save_pretrained(tmp_path)
    source = ModelSource("m", tmp_path)
    quantized = load_model(source, Compute(torch.device("cpu"), torch.float32, 4096, load_in_4bit=True))
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj has 3 rows of zeros"):
        attach_adapter(quantized, AdapterSettings(name="dora", r=4), 0, source)
