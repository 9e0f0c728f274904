"""Scoring on a GPU against transformers' eager attention on the same device, one row at a time.

Errors are measured against float64 on a CPU. A pack may be off by a few times what eager attention is off by on that
device: how far that is, is the device's business.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from stages.engine import flex_attention, tree_attention
from stages.engine.scorer import Scorer
from stages.runtime.compute import Compute
from tests.stages.engine import test_architectures as table
from tests.stages.engine import tiny_architectures as tiny

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BACKENDS = (flex_attention.NAME, tree_attention.NAME)
# Nats a token: float32 sums of some hundred terms, and what a pack adds to eager's own error.
FLOAT32_FLOOR, TIMES_EAGER = 2e-5, 4.0


def computed_on(device: torch.device, dtype: torch.dtype = torch.float32) -> Compute:
    # Packs of flex attention are filled up to the budget; on a CPU all pairs of positions are computed.
    return Compute(device, dtype, 4096 if device.type == "cuda" else 128)


def scored(scorer: Scorer) -> torch.Tensor:
    return table.scored(scorer, table.GROUPS).double().cpu()


@torch.no_grad()
def eager_logps(name: str, compute: Compute) -> torch.Tensor:
    """Each row alone through transformers' eager attention on the device, under the same autocast."""
    model = table.model_of(name, tiny.TRUTH.get(name, "eager")).to(compute.device)
    found = []
    with torch.autocast(compute.device.type, torch.bfloat16, enabled=compute.dtype == torch.bfloat16):
        for row in range(len(table.ROWS)):
            found.append(alone(deepcopy(model), row, compute.device))
    return torch.cat(found).double().cpu()


def alone(model: Any, row: int, device: torch.device) -> torch.Tensor:
    prompt, completion = (
        torch.from_numpy(side.astype("int64")).to(device)
        for side in (table.ROWS.prompt(row), table.ROWS.completion(row))
    )
    logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
    return logps.gather(1, completion[:, None])[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", table.PACKED)
def test_float32_log_probs_are_those_of_eager_attention(name: str, backend: str, device) -> None:
    compute, said = computed_on(device), []
    with torch.no_grad():
        wanted = table.truth_of(name)
        scorer = Scorer(table.model_of(name, "sdpa").to(device), compute, said.append, backends=[backend])
        found = scored(scorer)
    off = (eager_logps(name, compute) - wanted).abs().max()
    assert (found - wanted).abs().max() <= FLOAT32_FLOOR + TIMES_EAGER * off, (scorer.way, said)
    assert (scorer.way.backend or "unpacked") == (
        backend if "packed" in table.PACKED[name] or "short" in table.PACKED[name] else "unpacked"
    ), said


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name, way in table.PACKED.items() if way == "packed"])
def test_bfloat16_is_as_exact_as_eager_attention_in_bfloat16(name: str, backend: str, device) -> None:
    compute = computed_on(device, torch.bfloat16)
    with torch.no_grad():
        wanted = table.truth_of(name)
        scorer = Scorer(table.model_of(name, "sdpa").to(device), compute, print, backends=[backend])
        off_by = (scored(scorer) - wanted).abs()
    eager_off_by = (eager_logps(name, compute) - wanted).abs()
    assert off_by.mean() <= 2 * eager_off_by.mean()
    assert off_by.max() <= 3 * eager_off_by.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama/plain", "mistral/plain", "gemma2/plain", *table.WITH_GRADIENT])
def test_float32_gradients_are_those_of_eager_attention(name: str, backend: str, device) -> None:
    if device.type == "cpu" and backend == flex_attention.NAME:
        pytest.skip("flex_attention has no backward pass on a CPU")
    model = table.model_of(name, "eager").to(device)
    for row in range(len(table.ROWS)):
        table.with_gradient(model, row).sum().backward()
    wanted = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    scorer = Scorer(table.model_of(name, "sdpa").to(device), computed_on(device), print, backends=[backend])
    table.scored(scorer, table.GROUPS).sum().backward()
    for key, parameter in scorer.model.named_parameters():
        if key in wanted:
            scale = wanted[key].abs().max()
            assert (parameter.grad - wanted[key]).abs().max() <= 1e-4 * scale + 1e-6, key


@pytest.mark.parametrize("name", ["llama/plain", "mistral/plain", "gemma2/plain"])
def test_compiled_layers_have_the_log_probs_and_gradients_of_those_as_written(name: str, device) -> None:
    found = []
    for compiled in (False, True):
        model = table.model_of(name, "sdpa").to(device)
        logps = table.scored(
            Scorer(model, replace(computed_on(device), compile=compiled), print), table.GROUPS
        )
        logps.sum().backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found.append((logps.detach(), gradients))
    (plain, wanted), (compiled_logps, gradients) = found
    torch.testing.assert_close(compiled_logps, plain, rtol=0, atol=5e-5)
    for key, gradient in wanted.items():
        assert (gradients[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, key


def test_the_first_choice_on_a_gpu_is_flex_attention(device) -> None:
    said: list[str] = []
    scorer = Scorer(table.model_of("llama/plain", "sdpa").to(device), computed_on(device), said.append)
    assert scorer.way.backend == (flex_attention.NAME if device.type == "cuda" else tree_attention.NAME)
    assert said == []


def test_packs_of_any_content_take_one_compiled_shape(device) -> None:
    """Every pack has the length of the budget, so that nothing is compiled again."""
    compute = replace(computed_on(device), tokens_per_batch=2048 if device.type == "cuda" else 128)
    scorer = Scorer(table.model_of("llama/plain", "sdpa").to(device), compute, print, backends=BACKENDS[:1])
    with torch.no_grad():
        whole = scored(scorer)
        apart = [table.scored(scorer, [group]).double().cpu() for group in table.GROUPS]
    torch.testing.assert_close(torch.cat(apart), whole, rtol=0, atol=5e-5)
    if device.type == "cuda":
        counters = torch._dynamo.utils.counters["stats"]
        assert counters["unique_graphs"] <= 2, dict(counters)
