"""What holds for every loss, at its defaults and in its variants, on random pairs in a shuffled row order."""

import dataclasses
import math

import pytest
import torch

from stages.losses import LOSSES, Batch, Rows, Step, parse_loss

VARIANTS = [
    {"name": "dpo", "ld_alpha": 0.3},
    {"name": "dpo", "sft_weight": 0.5},
    {"name": "dpo", "f_divergence": "forward_kl"},
    {"name": "dpo", "f_divergence": "js_divergence"},
    {"name": "dpo", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"name": "ipo", "normalize": "sum"},
    {"name": "odpo", "f": "identity"},
    {"name": "odpo", "f": "log1p"},
    {"name": "wpo", "ld_alpha": 0.5, "sft_weight": 1},
    {"name": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.7},
    {"name": "simpo", "label_smoothing": 0.1},
    {"name": "alphapo", "alpha": -0.5},
    {"name": "orpo", "nll_span": "sequence"},
    {"name": "bco", "udm": True},
    {"name": "mixture", "parts": [{"loss": {"name": "kto"}}, {"loss": {"name": "odpo"}, "weight": 0.3}]},
    {"name": "mixture", "parts": [{"loss": {"name": "wpo"}}, {"loss": {"name": "sft"}}]},
    {
        "name": "mixture",
        "parts": [{"loss": {"name": "dpo"}}, {"loss": {"name": "orpo", "nll_span": "sequence"}}],
    },
    {
        "name": "mixture",
        "parts": [{"loss": {"name": "bco"}}, {"loss": {"name": "dpo"}}, {"loss": {"name": "aot"}}],
    },
]
CASES = [parse_loss({"name": name}) for name in LOSSES if name != "mixture"] + [
    parse_loss(v) for v in VARIANTS
]


def label(loss):
    """The name and what differs from the defaults."""
    if loss.name == "mixture":
        return "+".join(part.loss.name for part in loss.parts)
    return " ".join([loss.name, *(f"{k}={v}" for k, v in loss.model_dump(exclude_defaults=True).items())])


each_loss = pytest.mark.parametrize("loss", CASES, ids=label)


def random_batch(num_pairs=6, *, seed=0, dtype=torch.float64):
    """Rows with every optional column, in an order unlike that of the pairs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(2 * num_pairs, generator=generator, dtype=torch.float64)

    num_tokens = torch.randint(3, 30, (2 * num_pairs,), generator=generator).double()
    ref_logps = num_tokens * -(0.5 + normal().abs())
    logps = (ref_logps + normal(3)).clamp(max=-0.1)
    order = torch.randperm(2 * num_pairs, generator=generator)
    rows = Rows(
        logps=logps,
        num_tokens=num_tokens,
        ref_logps=ref_logps,
        weights=0.1 + normal().abs(),
        scores=normal(4),
        shared_logps=0.6 * logps,
        ref_shared_logps=0.5 * ref_logps,
        collision_logps=-0.5 - normal().abs(),
        prompt_logps=-5 - normal().abs(),
        num_prompt_tokens=num_tokens.flip(0),
        density_ratios=0.5 + normal().abs(),
    )
    rows = Rows(**{key: value.to(dtype) for key, value in vars(rows).items()})
    chosen, rejected = order.chunk(2)
    desirable = torch.zeros(2 * num_pairs, dtype=torch.bool).index_fill(0, chosen, True)
    return Batch(rows, desirable, chosen, rejected)


def random_step(dtype=torch.float64):
    return Step(
        kl=torch.tensor(0.7, dtype=dtype), tokens_per_pair=13.0, state={"reward_sum": 0.4, "reward_count": 8}
    )


def with_grad(batch):
    """The batch with log-probs that require a gradient; returns them too."""
    logps = batch.rows.logps.clone().requires_grad_()
    shared = 0.6 * logps
    return dataclasses.replace(
        batch, rows=dataclasses.replace(batch.rows, logps=logps, shared_logps=shared)
    ), logps


def take_pairs(batch, pair_indices):
    """A micro-batch: some of the pairs and their rows only."""
    rows = torch.cat([batch.chosen[pair_indices], batch.rejected[pair_indices]])
    count = len(pair_indices)
    return Batch(
        batch.rows.select(rows), batch.desirable[rows], torch.arange(count), torch.arange(count, 2 * count)
    )


@each_loss
def test_gradient_matches_finite_differences(loss):
    """The quantities that count as constants (wpo's weights, bco's delta) are held still."""
    batch = random_batch(num_pairs=3)
    alignment = batch.rows.mean_logps - batch.rows.collision_logps
    step = dataclasses.replace(random_step(), state={"reward_sum": 0.2e12, "reward_count": 1e12})

    def losses(logps):
        collision = (logps / batch.rows.num_tokens - alignment).detach()
        rows = dataclasses.replace(
            batch.rows, logps=logps, shared_logps=0.6 * logps, collision_logps=collision
        )
        return loss(dataclasses.replace(batch, rows=rows), step).losses

    assert torch.autograd.gradcheck(
        losses, batch.rows.logps.clone().requires_grad_(), check_undefined_grad=False
    )


@each_loss
def test_shapes_and_what_carries_a_gradient(loss):
    batch, _ = with_grad(random_batch())
    output = loss(batch, random_step())
    num_units = {"pair": 6, "row": 12}[loss.unit]
    assert output.losses.shape == (num_units,)
    assert output.losses.requires_grad
    assert output.rewards.shape == (12,)
    assert not output.rewards.requires_grad
    for values in output.metrics.values():
        assert values.shape == (num_units,)
        assert not values.requires_grad


@each_loss
@pytest.mark.parametrize("num_parts", [2, 3, 6])
def test_splitting_a_step_changes_nothing(loss, num_parts):
    """Except for the losses that say they need the whole step, which the split does change."""
    whole, whole_logps = with_grad(random_batch())
    expected = loss(whole, random_step())
    expected.losses.sum().backward()

    split, split_logps = with_grad(random_batch())
    outputs = [loss(take_pairs(split, pairs), random_step()) for pairs in torch.arange(6).chunk(num_parts)]
    total = torch.stack([output.losses.sum() for output in outputs]).sum()
    total.backward()

    same = torch.allclose(split_logps.grad, whole_logps.grad, rtol=0, atol=1e-12)
    assert same != loss.whole_step
    assert math.isclose(total.item(), expected.losses.sum().item(), rel_tol=1e-12) != loss.whole_step
    if not loss.whole_step:
        for key, values in expected.metrics.items():
            torch.testing.assert_close(
                torch.stack([o.metrics[key].sum() for o in outputs]).sum(), values.sum()
            )


@each_loss
def test_order_of_rows_and_pairs_does_not_matter(loss):
    batch, logps = with_grad(random_batch())
    loss(batch, random_step()).losses.sum().backward()
    other, other_logps = with_grad(random_batch())
    shuffled = take_pairs(other, torch.tensor([3, 0, 5, 4, 1, 2]))
    loss(shuffled, random_step()).losses.sum().backward()
    torch.testing.assert_close(other_logps.grad, logps.grad, rtol=0, atol=1e-12)


@each_loss
def test_swapping_chosen_and_rejected_flips_every_margin(loss):
    batch = random_batch()
    rewards = loss(batch, random_step()).rewards
    swapped = Batch(batch.rows, ~batch.desirable, batch.rejected, batch.chosen)
    swapped_rewards = loss(swapped, random_step()).rewards
    margins = rewards[batch.chosen] - rewards[batch.rejected]
    assert margins.abs().min() > 0
    assert torch.equal(swapped_rewards[swapped.chosen] - swapped_rewards[swapped.rejected], -margins)


@each_loss
def test_needs_are_honest(loss):
    """A loss works with what it lists in `needs` and nothing more, and fails loudly without any of it."""
    batch, step = random_batch(), random_step()
    fields = {field.name for field in dataclasses.fields(Rows)} - {"logps", "num_tokens", "weights"}
    assert loss.needs <= fields | {"weights", "desirable", "kl"}

    def run(absent, kl):
        rows = dataclasses.replace(batch.rows, **dict.fromkeys(absent))
        return loss(dataclasses.replace(batch, rows=rows), dataclasses.replace(step, kl=kl))

    kl = step.kl if "kl" in loss.needs else None
    assert torch.equal(run(fields - loss.needs, kl).losses, loss(batch, step).losses)
    for key in sorted(fields & loss.needs):
        with pytest.raises(AssertionError, match=f"{key} is not in the needs of the loss"):
            run([key], step.kl)
    if "kl" in loss.needs:
        with pytest.raises(AssertionError, match="kl is not in the needs of the loss"):
            run([], None)


@each_loss
def test_only_losses_that_list_desirable_read_it(loss):
    batch, step = random_batch(), random_step()
    other = dataclasses.replace(batch, desirable=~batch.desirable)
    assert torch.equal(loss(other, step).losses, loss(batch, step).losses) != ("desirable" in loss.needs)


@each_loss
def test_weights_change_exactly_the_losses_that_take_them(loss):
    batch = random_batch()
    plain = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, weights=None))
    weighted, unweighted = loss(batch, random_step()).losses, loss(plain, random_step()).losses
    if "weights" in loss.needs:
        torch.testing.assert_close(weighted, unweighted * batch.rows.weights[batch.chosen])
    elif loss.name != "mixture":
        assert torch.equal(weighted, unweighted)


@each_loss
def test_nothing_depends_on_values_outside_the_device(loss):
    """On the meta device there are no values: `.item()` or a branch on data would raise."""
    batch, step = random_batch(), random_step()
    rows = Rows(**{key: value.to("meta") for key, value in vars(batch.rows).items()})
    indices = (batch.desirable.to("meta"), batch.chosen.to("meta"), batch.rejected.to("meta"))
    output = loss(Batch(rows, *indices), dataclasses.replace(step, kl=step.kl.to("meta")))
    assert output.losses.device.type == "meta"


@each_loss
def test_float32_stays_float32_and_close_to_float64(loss):
    exact = loss(random_batch(), random_step())
    single = loss(random_batch(dtype=torch.float32), random_step(torch.float32))
    assert single.losses.dtype == single.rewards.dtype == torch.float32
    torch.testing.assert_close(single.losses.double(), exact.losses, rtol=2e-5, atol=2e-6)


@each_loss
@pytest.mark.parametrize("logps", [[-2000.0, -1e-4], [-1e-4, -2000.0]])
def test_hopeless_rows_stay_finite(pairs, loss, logps):
    """A policy 1000 nats from the reference, up and down: losses and gradients are numbers in float32."""
    columns = {"num_tokens": 200, "weights": 1, "ref_shared_logps": -500, "collision_logps": -1}
    columns |= {"prompt_logps": -9, "num_prompt_tokens": 3, "density_ratios": 2}
    batch, leaf = with_grad(
        pairs(
            logps[:1],
            logps[1:],
            [-1000.0],
            [-1000.0],
            dtype=torch.float32,
            scores=([2], [1]),
            **{key: ([value], [value]) for key, value in columns.items()},
        )
    )
    output = loss(batch, random_step(torch.float32))
    output.losses.sum().backward()
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(leaf.grad).all()


LN2 = math.log(2)
STEP_0 = {
    "dpo": LN2,
    "cdpo": LN2,
    "rdpo": LN2,
    "dpo_norm": LN2,
    "ipo": 25.0,
    "hinge": 1.0,
    "exo": -LN2 - 0.5 * math.log(1e-3 * (1 - 1e-3)),
    "nca": 2 * LN2,
    "sppo": 500_000.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
    "bco": LN2,
}


@pytest.mark.parametrize("name", STEP_0)
def test_step_0(name):
    """The policy is the reference: losses are known exactly, and every reward is 0."""
    batch = random_batch()
    batch = dataclasses.replace(
        batch, rows=dataclasses.replace(batch.rows, weights=None, logps=batch.rows.ref_logps)
    )
    output = parse_loss({"name": name})(batch, Step(kl=torch.tensor(0.0)))
    torch.testing.assert_close(
        output.losses, torch.full_like(output.losses, STEP_0[name]), rtol=1e-12, atol=0
    )
    assert torch.equal(output.rewards, torch.zeros_like(output.rewards))
