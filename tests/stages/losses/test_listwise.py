"""Losses of whole lists: by hand, what the models behind them say, and which losses of pairs they are for two."""

import dataclasses
import math
from itertools import permutations

import pytest
import torch

from stages.losses import Step, parse_loss

# A list of three, best first, of two with equal scores, and of four in no order.
LOGRATIOS = ([2.0, 0.0, -1.0], [1.0, -1.0], [0.5, -2.0, 1.5, 0.0])
SCORES = ([9.0, 5.0, 1.0], [3.0, 3.0], [2.0, 4.0, 1.0, 3.0])


def losses_of(batch, **block):
    return parse_loss(block)(batch, Step()).losses


def close(*values):
    return pytest.approx(list(values), abs=1e-6)


def test_plackett_luce_by_hand(lists):
    """log(1 + e^-2 + e^-3) + log(1 + e^-1); 0, as equals are not compared; then the order -2, 0, 0.5, 1.5:
    log(1 + e^2 + e^2.5 + e^3.5) + log(1 + e^0.5 + e^1.5) + log(1 + e)."""
    expected = close(0.1698460 + 0.3132617, 0, 3.9831709 + 1.9643688 + 1.3132617)
    assert losses_of(lists(LOGRATIOS, SCORES), name="plackett_luce", beta=1).tolist() == expected


def test_plackett_luce_is_a_distribution_over_orders(lists):
    """The likelihoods of the 24 orders of four completions add up to 1."""
    orders = list(permutations(range(4)))
    batch = lists([LOGRATIOS[2]] * len(orders), orders)
    total = torch.exp(-losses_of(batch, name="plackett_luce", beta=0.7)).sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_plackett_luce_at_the_reference_is_the_logarithm_of_the_number_of_orders(lists):
    batch = lists([[0.0] * 5], [range(5)])
    assert losses_of(batch, name="plackett_luce").item() == pytest.approx(
        math.log(math.factorial(5)), abs=1e-12
    )


def test_infonca_by_hand(lists):
    """Scores over 4: labels e^2.25, e^1.25, e^0.25 over their sum, 0.6652410, 0.2447285, 0.0900306; minus log softmax
    of 2, 0, -1: 0.1698460, 2.1698460, 3.1698460. Equal scores: halves of log(1 + e^-2) and 2 more."""
    found = losses_of(lists(LOGRATIOS[:2], SCORES[:2]), name="infonca", beta=1, alpha=4)
    assert found.tolist() == close(
        0.6652410 * 0.1698460 + 0.2447285 * 2.1698460 + 0.0900306 * 3.1698460, 1.1269280
    )


def test_infonca_of_a_small_alpha_is_the_likelihood_of_the_best(lists):
    """The authors' 1e-4 on scores of 1 to 9: all weight on the first, -log softmax = 0.1698460."""
    assert losses_of(lists(LOGRATIOS[:1], SCORES[:1]), name="infonca", beta=1).tolist() == close(0.1698460)


def test_exo_rw_by_hand(lists):
    """The same two distributions the other way: p = 0.8437947, 0.1141952, 0.0420101 and log q = -0.4076059,
    -1.4076059, -2.4076059."""
    found = losses_of(lists(LOGRATIOS[:1], SCORES[:1]), name="exo_rw", beta=1, score_beta=4)
    terms = (
        (0.8437947, 0.4076059 - 0.1698460),
        (0.1141952, 1.4076059 - 2.1698460),
        (0.0420101, 2.4076059 - 3.1698460),
    )
    assert found.tolist() == close(sum(p * gap for p, gap in terms))


def test_scores_are_reached_by_the_losses_that_fit_them(lists):
    """Log-ratios of score / beta: the policy's distribution is that of the scores, and the slope is 0."""
    logratios = torch.tensor([4.5, 2.5, 0.5], dtype=torch.float64, requires_grad=True)
    batch = lists([[0.0] * 3], SCORES[:1])
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, logps=logratios))
    for block in ({"name": "exo_rw", "beta": 2, "score_beta": 1}, {"name": "infonca", "beta": 2, "alpha": 1}):
        (slope,) = torch.autograd.grad(losses_of(batch, **block).sum(), logratios)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.003, 0.05, 0.4])
def test_qrpo_knows_its_partition_function(lists, beta):
    """Z is the integral of e^(q / beta) over the quantiles; here by the midpoint rule, scaled to stay finite."""
    quantiles = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1e6
    log_z = 1 / beta + math.log(torch.exp((quantiles - 1) / beta).mean().item())
    best = 1 - beta * log_z
    batch = lists([[best / beta, (best - 0.5) / beta]], [[1.0, 0.0]])
    assert losses_of(batch, name="qrpo", beta=beta).item() == pytest.approx(0, abs=1e-12)


def test_qrpo_by_hand(lists):
    """beta 1/2: log Z = log((e^2 - 1) / 2) = 1.1614393, half of it 0.5807196. Quantiles 1, 2/3, 1/3 less that and D / 2 =
    1, 0, -0.5: -0.5807196, 0.0859470, 0.2526137. Equals have 1 and 1: 1 - 0.5807196 -+ 0.5."""
    found = losses_of(lists(LOGRATIOS[:2], SCORES[:2]), name="qrpo", beta=0.5)
    squares = 0.5807196**2 + 0.0859470**2 + 0.2526137**2
    assert found.tolist() == close(squares / 3, (0.0807196**2 + 0.9192804**2) / 2)


def test_qrpo_is_the_authors_formula(lists):
    """CLAIRE-Labo/quantile-reward-policy-optimization 0d80ee5 README: log Z = log(beta) + 1 / beta at their beta."""
    beta, scores, logratios = 0.003, torch.tensor(SCORES[2]), torch.tensor(LOGRATIOS[2], dtype=torch.float64)
    quantiles = (scores[None, :] <= scores[:, None]).double().mean(1)
    expected = (quantiles - beta * (math.log(beta) + 1 / beta) - beta * logratios).square().mean()
    found = losses_of(lists(LOGRATIOS[2:], SCORES[2:]), name="qrpo", beta=beta)
    torch.testing.assert_close(found, expected[None], rtol=1e-12, atol=0)


PAIRS = ([[1.5, -0.5], [-2.0, 3.0]], [[7.0, 4.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("listwise", "pairwise", "constant"),
    [
        ({"name": "plackett_luce", "beta": 0.3}, {"name": "dpo", "beta": 0.3}, False),
        ({"name": "infonca", "beta": 0.3}, {"name": "dpo", "beta": 0.3}, False),
        ({"name": "infonca", "beta": 0.3, "alpha": 4}, {"name": "rpo", "beta": 0.3, "eta": 0.25}, True),
        (
            {"name": "exo_rw", "beta": 0.3, "score_beta": 4},
            {"name": "rpo", "beta": 0.3, "eta": 0.25, "distance": "forward_kl"},
            False,
        ),
    ],
)
def test_what_they_are_for_two_completions(lists, listwise, pairwise, constant):
    """Equal, or with the same slope."""
    found, slopes = [], []
    for block in (listwise, pairwise):
        batch = lists(*PAIRS)
        logps = batch.rows.logps.clone().requires_grad_()
        batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, logps=logps))
        found.append(losses_of(batch, **block))
        slopes.append(torch.autograd.grad(found[-1].sum(), logps)[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)
    assert torch.allclose(*found, rtol=0, atol=1e-12) != constant


@pytest.mark.parametrize("name", ["plackett_luce", "infonca", "exo_rw", "qrpo"])
def test_a_list_s_loss_does_not_depend_on_its_order_or_the_other_lists(lists, name):
    whole = losses_of(lists(LOGRATIOS, SCORES), name=name)
    for number, (logratios, scores) in enumerate(zip(LOGRATIOS, SCORES, strict=True)):
        alone = losses_of(lists([logratios[::-1]], [scores[::-1]]), name=name)
        torch.testing.assert_close(alone[0], whole[number], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["plackett_luce", "infonca", "exo_rw", "qrpo"])
def test_long_lists_of_hopeless_completions_stay_finite(lists, name):
    values = [-5000.0, 3000.0, -1.0, 0.0, 2000.0]
    batch = lists([values], [[5.0, 4.0, 3.0, 3.0, 1.0]], dtype=torch.float32)
    logps = batch.rows.logps.clone().requires_grad_()
    losses = losses_of(
        dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, logps=logps)), name=name
    )
    (slope,) = torch.autograd.grad(losses.sum(), logps)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slope).all()
