"""The table of fields that a loss may need: it has all of them, and their sums are right for long completions too."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.ref_logps import RefLogps
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packs import PackLogps, build_pack
from stages.losses import LOSSES, Batch, Rows, Step, parse_loss
from stages.losses.contract import CARRY_GRADIENT
from stages.train.step.row_fields import ALWAYS, FIELDS, RowSource, ScoredPack

LONG, SHORT, PROMPT = 32_768, 20_000, 4_097


def test_every_field_of_rows_has_a_function() -> None:
    fields = dataclasses.fields(Rows)
    assert set(FIELDS) == {field.name for field in fields}
    assert {field.name for field in fields if field.default is dataclasses.MISSING} == ALWAYS
    assert set(CARRY_GRADIENT) <= set(FIELDS)


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory) -> tuple[ScoredPack, Tensor]:
    """A pair of 32,768 and 20,000 tokens, an eighth of them masked, and the leaf of the policy's token log-probs.

    The reference's are near them, as at the beginning of a training: sums of 1e5 nats, log-ratios of some nats.
    """
    random = np.random.default_rng(0)
    rows = [
        Row(role, np.zeros(length, np.int32), random.random(length) < 0.875, score)
        for role, length, score in (("chosen", LONG, 2.0), ("rejected", SHORT, 1.0))
    ]
    example = Example("0", "made:0", np.zeros(PROMPT, np.int32), rows)
    row_set = RowSet([to_table([example], [0])])
    pack = build_pack(row_set, [np.arange(2)], with_prompts=True)
    policy = -random.exponential(4, LONG + SHORT + PROMPT - 1).astype(np.float32)
    reference = (policy[: LONG + SHORT] * random.normal(1, 0.001, LONG + SHORT)).astype(np.float32)
    store = RefLogps(tmp_path_factory.mktemp("reference"), {"made": "for the test"})
    store.add(row_set.keys, np.split(reference, [LONG]))
    leaf = torch.from_numpy(policy).requires_grad_()
    completions, prompts = leaf.split([LONG + SHORT, PROMPT - 1])
    logps = PackLogps(completions, prompts, 2 * completions.detach())
    return ScoredPack(RowSource(row_set, store, np.ones(2, np.float32)), pack, logps), leaf


def in_float64(scored: ScoredPack, leaf: Tensor) -> Rows:
    """The fields by numpy's float64, row by row, differentiable."""
    sides = [slice(0, LONG), slice(LONG, LONG + SHORT)]
    masks = [scored.source.rows.mask(row) == 1 for row in range(2)]
    reference = [torch.tensor(scored.source.reference.get(key)) for key in scored.source.rows.keys]
    shared = min(int(mask.sum()) for mask in masks)

    def stacked(of_row: Any) -> Tensor:
        return torch.stack([of_row(row) for row in range(2)])

    policy = [leaf[side].double()[mask] for side, mask in zip(sides, masks, strict=True)]
    other = [values.double()[mask] for values, mask in zip(reference, masks, strict=True)]
    return Rows(
        logps=stacked(lambda row: policy[row].sum()),
        num_tokens=torch.tensor([float(mask.sum()) for mask in masks], dtype=torch.float64),
        ref_logps=stacked(lambda row: other[row].sum()),
        weights=torch.ones(2, dtype=torch.float64),
        scores=torch.tensor([2.0, 1.0], dtype=torch.float64),
        shared_logps=stacked(lambda row: policy[row][:shared].sum()),
        ref_shared_logps=stacked(lambda row: other[row][:shared].sum()),
        collision_logps=stacked(lambda row: 2 * policy[row].detach().mean()),
        prompt_logps=leaf[LONG + SHORT :].double().sum().expand(2),
        num_prompt_tokens=torch.full((2,), PROMPT - 1.0, dtype=torch.float64),
        density_ratios=torch.ones(2, dtype=torch.float64),
    )


def test_sums_and_log_ratios_of_long_completions_are_those_of_float64(long_pair) -> None:
    """Float32 sums are off by half a nat, and so is their difference."""
    scored, leaf = long_pair
    wanted = in_float64(scored, leaf)
    found = Rows(**{name: make(scored) for name, make in FIELDS.items()})
    for name in FIELDS:
        torch.testing.assert_close(found.get(name).double(), wanted.get(name), rtol=2e-6, atol=0)
    for ratios in (lambda rows: rows.logratios, lambda rows: rows.shared_logps - rows.ref_shared_logps):
        torch.testing.assert_close(ratios(found).double(), ratios(wanted), rtol=0, atol=2e-6)


OPTIONS = {
    "odpo": {"alpha": 0.5},
    "orpo": {"nll_span": "sequence"},
    "bco": {"udm": True},
    "dpo": {"ld_alpha": 0.4, "sft_weight": 0.2},
    "mixture": {"parts": [{"loss": {"name": "dpo"}}, {"weight": 0.5, "loss": {"name": "kto"}}]},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_long_completions_and_its_gradient_are_those_of_float64(name: str, long_pair) -> None:
    """From the token log-probs, which are float32, to the loss; the gradient of each token's log-prob."""
    scored, leaf = long_pair
    loss = parse_loss({"name": name, **OPTIONS.get(name, {})})

    def loss_of(rows: Rows) -> tuple[Tensor, Tensor]:
        index = torch.arange(2)
        batch = Batch(rows, index == 0, index[:1], index[1:], torch.zeros_like(index), 1)
        kl = torch.tensor(0.25, dtype=torch.float64)
        value = loss(batch, Step(kl=kl, tokens_per_pair=20_000.0)).losses.mean()
        return value.detach(), torch.autograd.grad(value, leaf, retain_graph=True)[0]

    used = {*ALWAYS, *loss.needs}
    found, gradient = loss_of(Rows(**{key: make(scored) for key, make in FIELDS.items() if key in used}))
    exact = in_float64(scored, leaf)
    wanted, wanted_gradient = loss_of(
        Rows(**{key: value for key, value in vars(exact).items() if key in used})
    )
    assert wanted_gradient.abs().max() > 0
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    scale = wanted_gradient.abs().max()
    assert (gradient - wanted_gradient).abs().max() <= 2e-6 * scale
