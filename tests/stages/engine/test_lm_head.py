"""The log-prob head against float64 autograd, in every way it can be cut into chunks."""

import pytest
import torch

from stages.engine import lm_head
from stages.engine.lm_head import TokenLogps, collision_logps

TOKENS, WIDTH, VOCABULARY = 37, 12, 50


def inputs(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(1)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    return hidden, weight, torch.randn(VOCABULARY) if bias else None, torch.randint(0, VOCABULARY, (TOKENS,))


def closed_form(hidden, weight, bias, targets, scale, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0], logits


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("chunk", [5, 37, 512])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, None), (False, 2.0, 3.0)]
)
def test_values_and_gradients(monkeypatch, kept_bytes, chunk, bias, scale, softcap) -> None:
    monkeypatch.setattr(lm_head, "KEPT_LOGITS_BYTES", kept_bytes)
    monkeypatch.setattr(lm_head, "CHUNK_TOKENS", chunk)
    hidden, weight, shift, targets = inputs(bias)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, shift) if tensor is not None]
    slopes = torch.linspace(-1, 2, TOKENS)
    found = TokenLogps.apply(hidden, weight, shift, targets, scale, softcap)
    gradients = torch.autograd.grad((found * slopes).sum(), leaves)
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    shift64 = doubles[2] if bias else None
    expected, _ = closed_form(doubles[0], doubles[1], shift64, targets, scale, softcap)
    wanted = torch.autograd.grad((expected * slopes.double()).sum(), doubles)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_states_still_give_float32_log_probs_and_weight_gradients() -> None:
    """torch's own linear_cross_entropy returns bfloat16 here, with errors of 6e-2 nats a token."""
    hidden, weight, _, targets = inputs(bias=False)
    weight.requires_grad_()
    found = TokenLogps.apply(hidden.bfloat16(), weight, None, targets, 1.0, None)
    rounded = hidden.bfloat16().double() @ weight.detach().bfloat16().double().T
    exact = torch.log_softmax(rounded, -1).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    # bfloat16 logits have 8 bits: at |logit| up to about 12 the rounding is at most 2**-5 each.
    assert (found.double() - exact).abs().max() < 2**-4
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
def test_torchs_linear_cross_entropy_gives_log_probs_in_bfloat16() -> None:
    """The reason for a head of our own: once this fails, torch's may do."""
    hidden, weight, _, targets = inputs(bias=False)
    torchs = torch.nn.functional.linear_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), targets, reduction="none"
    )
    ours = TokenLogps.apply(hidden.bfloat16(), weight, None, targets, 1.0, None)
    rounded = hidden.bfloat16().double() @ weight.bfloat16().double().T
    exact = torch.log_softmax(rounded, -1).gather(1, targets[:, None])[:, 0]
    assert torchs.dtype == torch.bfloat16
    assert (-torchs.double() - exact).abs().max() > (ours.double() - exact).abs().max()


def test_collision_is_the_log_of_the_sum_of_squared_probabilities() -> None:
    hidden, weight, _, targets = inputs(bias=False)
    _, logits = closed_form(hidden.double(), weight.double(), None, targets, 1.0, None)
    wanted = torch.log((torch.softmax(logits, -1) ** 2).sum(-1))
    torch.testing.assert_close(
        collision_logps(hidden, weight, None, 1.0, None).double(), wanted, rtol=0, atol=1e-5
    )


def test_zero_tokens_give_empty_log_probs() -> None:
    hidden, weight, _, targets = inputs(bias=False)
    assert TokenLogps.apply(hidden[:0], weight, None, targets[:0], 1.0, None).shape == (0,)
