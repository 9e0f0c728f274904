"""Losses that must agree with each other, and facts of the papers that tie a formula down."""

import dataclasses
import math

import pytest
import torch

from stages.losses import Step, parse_loss


@pytest.fixture
def batch(pairs):
    """Five pairs with unequal lengths; the scores say the chosen one is better, except in the last pair."""
    return pairs(
        [-12.0, -30.5, -7.1, -20.0, -3.3],
        [-15.0, -28.0, -9.4, -20.0, -2.0],
        [-13.0, -30.0, -8.0, -21.5, -3.0],
        [-14.0, -29.0, -9.0, -20.5, -2.5],
        num_tokens=([6, 12, 3, 9, 2], [5, 14, 4, 9, 1]),
        scores=([9, 5, 4, 8, 1], [1, 4, 3.5, 2, 3]),
        shared_logps=([-11, -30.5, -7.1, -20, -1], [-15, -26, -9, -20, -2]),
        ref_shared_logps=([-12, -30, -8, -21.5, -1.5], [-14, -25, -8, -20.5, -2.5]),
    )


def losses(batch, block, step=None):
    return parse_loss(block)(batch, step or Step(tokens_per_pair=6.4)).losses


def equal(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "block",
    [
        {"name": "odpo", "alpha": 0},
        {"name": "cdpo", "label_smoothing": 0},
        {"name": "rdpo", "label_smoothing": 0},
        {"name": "dpo", "ld_alpha": 1},
        {"name": "mixture", "parts": [{"loss": {"name": "dpo"}}]},
    ],
)
def test_reduces_to_dpo(batch, block):
    equal(losses(batch, block), losses(batch, {"name": "dpo"}))


def test_dpo_norm_on_equal_lengths_is_dpo_with_beta_over_length(pairs):
    batch = pairs([-3.0, -5.0], [-4.0, -1.0], [-2.0, -5.5], [-4.5, -2.0], num_tokens=([7, 7], [7, 7]))
    equal(losses(batch, {"name": "dpo_norm", "beta": 0.7}), losses(batch, {"name": "dpo", "beta": 0.1}))


def test_ipo_of_means_on_single_tokens_is_ipo_of_sums(pairs):
    batch = pairs([-3.0, -5.0], [-4.0, -1.0], [-2.0, -5.5], [-4.5, -2.0])
    equal(losses(batch, {"name": "ipo"}), losses(batch, {"name": "ipo", "normalize": "sum"}))


def test_rdpo_is_unbiased_under_flipped_labels(batch):
    """Flipping 20 % of the labels at random leaves the mean of rdpo's loss where dpo's is on clean labels."""
    flipped = dataclasses.replace(
        batch, chosen=batch.rejected, rejected=batch.chosen, desirable=~batch.desirable
    )
    rdpo = {"name": "rdpo", "label_smoothing": 0.2}
    equal(0.8 * losses(batch, rdpo) + 0.2 * losses(flipped, rdpo), losses(batch, {"name": "dpo"}))


def test_cdpo_is_smallest_where_the_policy_believes_in_the_noise(pairs):
    """At beta h = log((1 - eps) / eps) the gradient is 0."""
    chosen = torch.tensor([math.log(9) / 0.1], dtype=torch.float64, requires_grad=True)
    batch = pairs([0.0], [0.0], [0.0], [0.0])
    logps = torch.cat([chosen, torch.zeros(1, dtype=torch.float64)])
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, logps=logps))
    losses(batch, {"name": "cdpo", "label_smoothing": 0.1}).sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("kl", [0.0, -2.5])
def test_kto_without_distance_is_half_of_apo_zero(batch, kl):
    """A negative estimate of the KL counts as 0."""
    step = Step(kl=torch.tensor(kl, dtype=torch.float64))
    kto = losses(batch, {"name": "kto"}, step)
    equal(kto, losses(batch, {"name": "apo_zero_unpaired"}))
    equal((kto[batch.chosen] + kto[batch.rejected]) / 2, losses(batch, {"name": "apo_zero"}) / 2)


@pytest.mark.parametrize(
    ("coefficient", "limit"),
    [(1 - 1e-9, {"name": "dpo"}), (1e-9, {"name": "dpo", "f_divergence": "forward_kl"})],
)
def test_alpha_divergence_lies_between_reverse_and_forward_kl(batch, coefficient, limit):
    block = {"name": "dpo", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    equal(losses(batch, block), losses(batch, limit), tolerance=1e-7)


def test_every_divergence_has_the_slope_of_dpo_at_the_reference(pairs):
    """f'(u) behaves like log u near u = 1, up to a constant factor: 1, and 1/2 for Jensen-Shannon."""
    nudged = pairs([-5.0 + 1e-6], [-5.0], [-5.0], [-5.0])
    still = pairs([-5.0], [-5.0], [-5.0], [-5.0])
    expected = {"reverse_kl": 1.0, "forward_kl": 1.0, "js_divergence": 0.5, "alpha_divergence": 1.0}
    for divergence, slope in expected.items():
        coefficient = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
        block = {"name": "dpo", "beta": 1, "f_divergence": divergence, **coefficient}
        change = (losses(nudged, block) - losses(still, block)).item() / 1e-6
        assert change == pytest.approx(-slope / 2, rel=1e-5)


@pytest.mark.parametrize("alpha", [1e-8, -1e-8])
def test_alphapo_tends_to_simpo(batch, alpha):
    alphapo = {"name": "alphapo", "beta": 2.5, "gamma": 0.5, "alpha": alpha}
    simpo = {"name": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.2}
    equal(losses(batch, alphapo), losses(batch, simpo), tolerance=1e-6)


def test_orpo_and_cpo_add_the_same_nll(batch):
    """The mean per chosen token of each pair; what else orpo adds is its odds term."""
    orpo = parse_loss({"name": "orpo"})(batch, Step())
    cpo = parse_loss({"name": "cpo"})(batch, Step())
    equal(orpo.metrics["nll"], cpo.metrics["nll"])
    equal(
        orpo.losses - orpo.metrics["nll"], 0.1 * torch.nn.functional.softplus(-orpo.metrics["log_odds_ratio"])
    )


@pytest.mark.parametrize(
    ("logp", "log_odds"),
    [
        # p = e^-1e-4: 1 - p = 1e-4 - 5e-9 + ..., so log(p / (1 - p)) = -1e-4 + log(1e4) + 5e-5.
        (-1e-4, math.log(1e4) - 5e-5),
        (-math.log(2), 0.0),
        # p = e^-50: log(1 - p) vanishes.
        (-50.0, -50.0),
    ],
)
def test_orpo_odds_are_exact_in_float32(pairs, logp, log_odds):
    batch = pairs([logp], [-math.log(2)], dtype=torch.float32)
    metrics = parse_loss({"name": "orpo"})(batch, Step()).metrics
    assert metrics["log_odds_ratio"].item() == pytest.approx(log_odds, abs=1e-6, rel=1e-6)


def test_orpo_of_a_certain_completion_is_finite(pairs):
    """In float32 the log-prob of a completion can round to 0, whose odds are infinite."""
    logps = torch.zeros(2, requires_grad=True)
    batch = pairs([0.0], [0.0], dtype=torch.float32)
    output = parse_loss({"name": "orpo"})(
        dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, logps=logps)), Step()
    )
    output.losses.sum().backward()
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(logps.grad).all()


def test_sft_is_the_mean_over_tokens(batch):
    """32 chosen tokens in 5 pairs; the mean over pairs is the sum of log-probs over 32."""
    mean = losses(batch, {"name": "sft"}).mean()
    equal(mean, torch.tensor((12.0 + 30.5 + 7.1 + 20.0 + 3.3) / 32, dtype=torch.float64))


def test_bco_state_is_the_mean_of_all_rewards_so_far(pairs):
    """Three steps one by one: the third's delta is the mean over all three."""
    bco = parse_loss({"name": "bco", "beta": 1})
    steps = [pairs([d], [0.0], [0.0], [d], dtype=torch.float32) for d in (1.0, 5.0, -3.0)]
    steps.append(pairs([2.0, 7.0], [3.0, 1.0], [0.0, 0.0], [0.0, 0.0], dtype=torch.float32))
    state, rewards = {}, []
    for batch in steps:
        output = bco(batch, Step(state=state))
        rewards += output.rewards.tolist()
        assert output.metrics["delta"].tolist() == pytest.approx(
            [sum(rewards) / len(rewards)] * len(output.losses)
        )
        state = bco.next_state(output.rewards, state)
    assert state == {"reward_sum": pytest.approx(sum(rewards)), "reward_count": len(rewards)}


def test_a_mixture_carries_the_state_of_its_first_part(pairs):
    mixture = parse_loss({"name": "mixture", "parts": [{"loss": {"name": "bco"}}, {"loss": {"name": "dpo"}}]})
    batch = pairs([-1.0], [-2.0], [-4.0], [-3.0])
    bco = parse_loss({"name": "bco"})
    state = mixture.next_state(mixture(batch, Step()).rewards, {})
    assert state == bco.next_state(bco(batch, Step()).rewards, {})
    assert state["reward_count"] == 2
    delta = mixture(batch, Step(state={"reward_sum": 8.0, "reward_count": 2.0})).metrics["bco/delta"]
    assert delta.tolist() == pytest.approx([(8.0 + 0.3 + 0.1) / 4])


def test_only_losses_that_keep_state_change_it(batch):
    rewards = batch.rows.logratios
    for name, keeps_state in [("dpo", False), ("kto", False), ("bco", True)]:
        loss = parse_loss({"name": name})
        assert (loss.next_state(rewards, {"kept": 1.0}) == {"kept": 1.0}) != keeps_state
        assert loss.keeps_state == keeps_state


@pytest.mark.parametrize(
    ("parts", "needs", "traits"),
    [
        (["simpo", "sft"], set(), set()),
        (["dpo", "sft"], {"ref_logps"}, set()),
        (["simpo", "kto"], {"ref_logps", "desirable", "kl"}, set()),
        (["sft", "odpo"], {"ref_logps", "scores"}, set()),
        (["dpo", "odpo"], {"ref_logps", "scores", "weights"}, set()),
        (["bco", "dpo"], {"ref_logps", "desirable"}, {"whole_step", "keeps_state"}),
        (["dpo", "aot"], {"ref_logps"}, {"whole_step"}),
        (["wpo", "sft"], {"ref_logps", "collision_logps"}, set()),
    ],
)
def test_a_mixture_needs_what_its_parts_need(parts, needs, traits):
    mixture = parse_loss({"name": "mixture", "parts": [{"loss": {"name": name}} for name in parts]})
    assert mixture.needs == needs
    assert {trait for trait in ("whole_step", "keeps_state") if getattr(mixture, trait)} == traits
