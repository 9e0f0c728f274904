"""Every loss on three pairs (see the fixture `triple`), with the arithmetic beside the expected numbers."""

import dataclasses

import pytest
import torch

from stages.losses import Step, parse_loss


def losses_of(batch, step=Step(), **block):  # noqa: B008
    return parse_loss(block)(batch, step).losses.tolist()


def close(*values):
    return pytest.approx(list(values), abs=1e-7)


def with_rows(batch, **columns):
    rows = dataclasses.replace(
        batch.rows, **{k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()}
    )
    return dataclasses.replace(batch, rows=rows)


def test_dpo(triple):
    """log(1 + e^-h): log(1 + e^-3), log 2, log(1 + e^3) = 3 + log(1 + e^-3)."""
    assert losses_of(triple, name="dpo", beta=1) == close(0.0485874, 0.6931472, 3.0485874)


def test_beta_scales_the_margin(triple):
    """log(1 + e^-1.5), log 2, log(1 + e^1.5)."""
    assert losses_of(triple, name="dpo", beta=0.5) == close(0.2014133, 0.6931472, 1.7014133)


def test_cdpo(triple):
    """3/4 of dpo's loss, 1/4 of the flipped pair's: 0.75 * 0.0485874 + 0.25 * 3.0485874, log 2, the reverse."""
    assert losses_of(triple, name="cdpo", beta=1, label_smoothing=0.25) == close(
        0.7985874, 0.6931472, 2.2985874
    )


def test_rdpo(triple):
    """(0.75 * 0.0485874 - 0.25 * 3.0485874) / 0.5, log 2, (0.75 * 3.0485874 - 0.25 * 0.0485874) / 0.5."""
    assert losses_of(triple, name="rdpo", beta=1, label_smoothing=0.25) == close(
        -1.4514126, 0.6931472, 4.5485874
    )


def test_dpo_norm(triple):
    """log(1 + e^-x) at x = 1, 0, -2."""
    assert losses_of(triple, name="dpo_norm", beta=1) == close(0.3132617, 0.6931472, 2.126928)


def test_ipo_of_means(triple):
    """Target 1 / (2 * 0.5) = 1: (1 - 1)^2, (0 - 1)^2, (-2 - 1)^2."""
    assert losses_of(triple, name="ipo", beta=0.5) == close(0, 1, 9)


def test_ipo_of_sums(triple):
    """(3 - 1)^2, (0 - 1)^2, (-3 - 1)^2."""
    assert losses_of(triple, name="ipo", beta=0.5, normalize="sum") == close(4, 1, 16)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        # log: offsets log 4, log 1 = 0, log 2: log(1 + 4 e^-3), log 2, log(1 + 2 e^3).
        ({"f": "log"}, (0.1816115, 0.6931472, 3.7177359)),
        # identity, alpha 1/2: offsets 2, 1/2, 1: log(1 + e^-1), log(1 + e^0.5), log(1 + e^4).
        ({"f": "identity", "alpha": 0.5}, (0.3132617, 0.974077, 4.0181499)),
        # log1p: offsets log 5, log 2, log 3: log(1 + 5 e^-3), log 3, log(1 + 3 e^3).
        ({"f": "log1p"}, (0.2222915, 1.0986123, 4.1150718)),
    ],
)
def test_odpo(triple, block, expected):
    """Score gaps of 4, 1 and 2."""
    scored = with_rows(triple, scores=[5, 1, 3, 1, 0, 1])
    assert losses_of(scored, name="odpo", beta=1, **block) == close(*expected)


def test_odpo_drops_and_counts_pairs_without_a_gap(triple):
    """Gaps 4, 0 and -1: only the first pair has a loss, 2 of 3 are dropped."""
    scored = with_rows(triple, scores=[5, 1, 0, 1, 1, 1])
    output = parse_loss({"name": "odpo", "beta": 1})(scored, Step())
    assert output.losses.tolist() == close(0.1816115, 0, 0)
    assert output.metrics["odpo_dropped"].tolist() == [0, 1, 1]


def test_odpo_keeps_the_nll_of_a_pair_whose_preference_it_drops(triple):
    """-a_w = 1, 1, 6 are the metric's pairs and the loss's: only the preference has no meaning without a gap."""
    scored = with_rows(triple, scores=[5, 1, 0, 1, 1, 1])
    output = parse_loss({"name": "odpo", "beta": 1, "sft_weight": 1})(scored, Step())
    assert output.losses.tolist() == close(1.1816115, 1, 6)
    assert output.metrics["nll"].tolist() == close(1, 1, 6)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        # z = h / 2 = 1.5, 0, -1.5 and t = (s_w - s_l) / 2 = 2, 0.5, -1; s(2) = 0.8807971, s(1.5) = 0.8175745:
        # 0.8807971 log(0.8807971 / 0.8175745) + 0.1192029 log(0.1192029 / 0.1824255) = 0.0656064 - 0.0507226, ...
        ("backward_kl", (0.0148838, 0.0302999, 0.0226223)),
        # 0.8175745 log(0.8175745 / 0.8807971) + 0.1824255 log(0.1824255 / 0.1192029) = -0.0608973 + 0.0776247, ...
        ("forward_kl", (0.0167275, 0.0309298, 0.0206356)),
        ("squared", (0.25, 0.25, 0.25)),
    ],
)
def test_rpo(triple, distance, expected):
    """Score gaps of 4, 1 and -2, half of which are the targets."""
    scored = with_rows(triple, scores=[5, 1, 0, 1, 0, 2])
    assert losses_of(scored, name="rpo", beta=0.5, eta=0.5, distance=distance) == close(*expected)


def test_dpop(triple):
    """D_w = 1, 0, -1, of which the last has lost 1: margins 3, 0, -3 - 2."""
    assert losses_of(triple, name="dpop", beta=1, dpop_lambda=2) == close(0.0485874, 0.6931472, 5.0067153)


def test_chipo(triple):
    """phi = e^D + D: 3.7182818, 1, -0.6321206 and -1.8646647, 1, 9.3890561; half of the differences: 2.7914733,
    0, -5.0105883."""
    assert losses_of(triple, name="chipo", beta=0.5) == close(0.0595236, 0.6931472, 5.0172332)


def test_cal_dpo(triple):
    """dpo with beta 1 and the squares of sppo: 0.0485874 + 1, 0.6931472 + 2, 3.0485874 + 13."""
    assert losses_of(triple, name="cal_dpo", beta=0.5) == close(1.0485874, 2.6931472, 16.0485874)


def test_hinge(triple):
    """1 - h / 2, not below 0: -0.5 -> 0, 1, 2.5."""
    assert losses_of(triple, name="hinge", beta=0.5) == close(0, 1, 2.5)


def test_exo(triple):
    """s(3) = 0.9525741: 0.9525741 (log 0.9525741 - log 0.75) + 0.0474259 (log 0.0474259 - log 0.25) = 0.1489197;
    s(0): log 0.5 - (log 0.75 + log 0.25) / 2 = 0.1438410; s(-3), the weights swapped: 1.1433267."""
    assert losses_of(triple, name="exo", beta=1, label_smoothing=0.25) == close(
        0.1489197, 0.143841, 1.1433267
    )


def test_nca(triple):
    """-log s(1) - log s(-1) / 2 - log s(2) / 2 = 0.3132617 + 0.6566308 + 0.0634640; 2 log 2;
    -log s(-1) - log s(1) / 2 - log s(-2) / 2 = 1.3132617 + 0.1566308 + 1.0634640."""
    assert losses_of(triple, name="nca", beta=1) == close(1.0333565, 1.3862944, 2.5333565)


def test_sppo(triple):
    """Targets 1 and -1: 0 + (-2 + 1)^2, (0 - 1)^2 + (0 + 1)^2, (-1 - 1)^2 + (2 + 1)^2."""
    assert losses_of(triple, name="sppo", beta=0.5) == close(1, 2, 13)


def test_aot(pairs):
    """Policy margins 1, 3, 2 sort to 1, 2, 3, reference margins 2, 0, 5 to 0, 2, 5: differences 1, 0, -2."""
    batch = pairs([-1, -1, -1], [-2, -4, -3], [-1, -1, -1], [-3, -1, -6])
    assert losses_of(batch, name="aot", beta=1) == close(0.3132617, 0.6931472, 2.126928)


def test_aot_unpaired(triple):
    """D_w sorts to -1, 0, 1 and D_l to -2, 0, 2: differences 1, 0, -1."""
    assert losses_of(triple, name="aot_unpaired", beta=1) == close(0.3132617, 0.6931472, 1.3132617)


def test_apo_zero(triple):
    """1 - s(1) + s(-2) = 0.2689414 + 0.1192029; 1 - 0.5 + 0.5; 1 - s(-1) + s(2) = 0.7310586 + 0.8807971."""
    assert losses_of(triple, name="apo_zero", beta=1) == close(0.3881443, 1, 1.6118557)


def test_apo_down(triple):
    """s(1) + 1 - s(3) = 0.7310586 + 0.0474259; 0.5 + 0.5; s(-1) + 1 - s(-3) = 0.2689414 + 0.9525741."""
    assert losses_of(triple, name="apo_down", beta=1) == close(0.7784845, 1, 1.2215155)


def test_apo_of_means(triple):
    """d_w = 0.5, 0, -1 and d_l = -0.5, 0, 1: 1 - s(0.5) + s(-0.5) = 0.7550813, ...; s(0.5) + 1 - s(1) = 0.8914007, ..."""
    assert losses_of(triple, name="apo_zero", beta=1, normalize="mean") == close(0.7550813, 1, 1.4621172)
    assert losses_of(triple, name="apo_down", beta=1, normalize="mean") == close(0.8914007, 1, 1.1497385)
    rewards = parse_loss({"name": "apo_zero", "beta": 1, "normalize": "mean"})(triple, Step()).rewards
    assert rewards.tolist() == [1, 0, -1, -2, 0, 2]


def test_discopop(triple):
    """m = s(h / 0.5), s(6) = 0.9975274: 0.0024726 * 0.0485874 + 0.9975274 e^-3; (log 2 + 1) / 2;
    0.9975274 * 3.0485874 + 0.0024726 e^3."""
    assert losses_of(triple, name="discopop", beta=1, tau=0.5) == close(0.0497841, 0.8465736, 3.0907133)


def test_wpo(triple):
    """Weights e^(a - collision): chosen 1, 1/2, 1, rejected 1/2, 1/2, 1; so 1/2, 1/4 and 1 times dpo."""
    half = 0.6931471805599453
    batch = with_rows(triple, collision_logps=[-1, -1 + half, -6, -1.25 + half, -2 + half, -1.5])
    assert losses_of(batch, name="wpo", beta=1) == close(0.0242937, 0.1732868, 3.0485874)


def test_wpo_bounds_the_product_of_the_weights_not_each_of_them(triple):
    """Chosen 4, 2, 1, rejected 1/2, 1/4, 4: products 2, 1/2 and 4, bounded to 1, 1/2, 1; or not, as in TRL."""
    half = 0.6931471805599453
    batch = with_rows(
        triple, collision_logps=[-1 - 2 * half, -1 - half, -6, -1.25 + half, -2 + 2 * half, -1.5 - 2 * half]
    )
    assert losses_of(batch, name="wpo", beta=1) == close(0.0485874, 0.3465736, 3.0485874)
    as_trl = {"name": "wpo", "beta": 1, "clamp_weights": False}
    assert losses_of(batch, **as_trl) == close(0.0971747, 0.3465736, 12.1943495)


def test_ld_alpha(triple):
    """Shared lengths 2, 2, 1. Log-ratios up to there: chosen 1, 1, -1, rejected -1, 0, 0; half of the rest
    (0, -1, 0 and -1, 0, 2) is added: 1, 0.5, -1 and -1.5, 0, 1; margins 2.5, 0.5, -2."""
    batch = with_rows(
        triple, shared_logps=[-2, -1, -6, -2, -4, -2], ref_shared_logps=[-3, -2, -5, -1, -4, -2]
    )
    assert losses_of(batch, name="dpo", beta=1, ld_alpha=0.5) == close(0.0788897, 0.474077, 2.126928)


def test_sft_weight(triple):
    """Half of -a_w = 1, 1, 6 on top of dpo."""
    assert losses_of(triple, name="dpo", beta=1, sft_weight=0.5) == close(0.5485874, 1.1931472, 6.0485874)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        # 1 - e^-D: chosen 0.6321206, 0, -1.7182818, rejected -6.3890561, 0, 0.8646647.
        ({"f_divergence": "forward_kl"}, (0.0008924, 0.6931472, 2.6557797)),
        # log 2 + log s(D): chosen 0.3798855, 0, -0.6201145, rejected -1.4337808, 0, 0.5662192.
        ({"f_divergence": "js_divergence"}, (0.1510504, 0.6931472, 1.4527962)),
        # (e^(-D/2) - 1) / (-1/2): chosen 0.7869387, 0, -1.2974425, rejected -3.4365637, 0, 1.2642411.
        (
            {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
            (0.014541, 0.6931472, 2.6360252),
        ),
    ],
)
def test_f_divergences(triple, block, expected):
    assert losses_of(triple, name="dpo", beta=1, **block) == close(*expected)


def test_weights_multiply_whole_pairs(triple):
    """Chosen rows weigh 2, 1, 0; the rejected rows' weights do not count. (0.0485874 + 1) * 2, log 2 + 1, 0."""
    batch = with_rows(triple, weights=[2, 1, 0, 7, 7, 7])
    assert losses_of(batch, name="dpo", beta=1, sft_weight=1) == close(2.0971747, 1.6931472, 0)


def test_kto(triple):
    """z = 1. Desirable 1 - s(D - 1) at D = 1, 0, -1; undesirable 2 (1 - s(1 - D)) at D = -2, 0, 2."""
    losses = losses_of(triple, Step(kl=torch.tensor(1.0)), name="kto", beta=1, undesirable_weight=2)
    assert losses == close(0.5, 0.7310586, 0.8807971, 0.0948517, 0.5378828, 1.4621172)


def test_apo_zero_unpaired(triple):
    """1 - s(D) at 1, 0, -1, twice s(D) at -2, 0, 2."""
    losses = losses_of(triple, name="apo_zero_unpaired", beta=1, undesirable_weight=2)
    assert losses == close(0.2689414, 0.5, 0.7310586, 0.2384058, 1, 1.7615942)


def test_bco(triple):
    """Earlier steps left a sum of 6 over 6 rewards; this step's six sum to 0, so delta = 6 / 12 = 0.5.
    -log s(D - 0.5) at 1, 0, -1 and -log s(0.5 - D) at -2, 0, 2."""
    step = Step(state={"reward_sum": 6.0, "reward_count": 6.0})
    output = parse_loss({"name": "bco", "beta": 1})(triple, step)
    assert output.losses.tolist() == close(0.474077, 0.974077, 1.7014133, 0.0788897, 0.474077, 1.7014133)
    assert output.metrics["delta"].tolist() == [0.5] * 6


def test_bco_evaluates_with_the_mean_of_the_training_steps_alone(triple):
    """delta = 6 / 6 = 1 whatever is evaluated: -log s(D - 1) at 1, 0, -1 and -log s(1 - D) at -2, 0, 2."""
    step = Step(state={"reward_sum": 6.0, "reward_count": 6.0}, training=False)
    expected = close(0.6931472, 1.3132617, 2.126928, 0.0485874, 0.3132617, 1.3132617)
    assert losses_of(triple, step, name="bco", beta=1) == expected
    first = dataclasses.replace(triple, rejected=triple.rejected[:1], chosen=triple.chosen[:1])
    output = parse_loss({"name": "bco", "beta": 1})(first, dataclasses.replace(step, state={}))
    assert output.metrics["delta"].tolist() == [0] * 6


def test_simpo(triple):
    """2 (a_w - a_l - 0.25) = 2 (0.25 - 0.25), 2 (1 - 0.25), 2 (-4.5 - 0.25) = 0, 1.5, -9.5."""
    assert losses_of(triple, name="simpo", gamma_beta_ratio=0.25) == close(0.6931472, 0.2014133, 9.5000748)


def test_simpo_with_label_smoothing(triple):
    """A quarter of the flipped loss, which is larger by z: log 2, 0.2014133 + 1.5 / 4, 9.5000748 - 9.5 / 4."""
    losses = losses_of(triple, name="simpo", gamma_beta_ratio=0.25, label_smoothing=0.25)
    assert losses == close(0.6931472, 0.5764133, 7.1250748)


def test_simper(triple):
    """e^a: 0.3678794, 0.3678794, 0.0024788 and 0.2865048, 0.1353353, 0.2231302."""
    output = parse_loss({"name": "simper"})(triple, Step())
    assert output.losses.tolist() == close(-0.0813746, -0.2325442, 0.2206514)
    assert output.rewards.tolist() == [-1, -1, -6, -1.25, -2, -1.5]


def test_orpo_with_the_nll_of_the_sequence(pairs):
    """(-14 - 2) / (6 + 2) = -2; a prompt of one token has none that is predicted: (0 - 3) / (0 + 3) = -1."""
    batch = pairs(
        [-2, -3],
        [-5, -4],
        num_tokens=([2, 3], [4, 2]),
        prompt_logps=([-14, 0], [-14, 0]),
        num_prompt_tokens=([6, 0], [6, 0]),
    )
    completion = parse_loss({"name": "orpo"})(batch, Step())
    sequence = parse_loss({"name": "orpo", "nll_span": "sequence"})(batch, Step())
    assert sequence.metrics["nll"].tolist() == [2, 1]
    assert completion.metrics["nll"].tolist() == [1, 1]
    torch.testing.assert_close(
        sequence.losses - completion.losses, torch.tensor([1.0, 0.0], dtype=torch.float64)
    )


def test_orpo(triple):
    """Log-odds a - log(1 - e^a): -0.5413249, -0.5413249, -5.9975182 and -0.9124205, -1.8545865, -1.2475176.
    -a_w + 0.5 log(1 + e^-x) at x = 0.3710956, 1.3132617, -4.7500006."""
    output = parse_loss({"name": "orpo", "beta": 0.5})(triple, Step())
    assert output.losses.tolist() == close(1.2623578, 1.1190915, 8.3793076)
    assert output.metrics["log_odds_ratio"].tolist() == close(0.3710956, 1.3132617, -4.7500006)
    assert output.metrics["nll"].tolist() == close(1, 1, 6)


def test_cpo(triple):
    """log(1 + e^-(L_w - L_l) / 2) at L_w - L_l = 3, 0, -3, and twice -a_w = 1, 1, 6."""
    assert losses_of(triple, name="cpo", beta=0.5, cpo_alpha=2) == close(2.2014133, 2.6931472, 13.7014133)


def test_alphapo(triple):
    """r = 2 (1 - e^(-a/2)): -1.2974425, -1.2974425, -38.1710738 and -1.7364919, -3.4365637, -2.2340000;
    log(1 + e^-x) at x = r_w - r_l - 0.5 = -0.0609506, 1.6391212, -36.4370738."""
    output = parse_loss({"name": "alphapo", "beta": 1, "alpha": 0.5, "gamma": 0.5})(triple, Step())
    assert output.losses.tolist() == close(0.7240868, 0.1774351, 36.4370738)
    assert output.rewards.tolist() == close(
        -1.2974425, -1.2974425, -38.1710738, -1.7364919, -3.4365637, -2.234
    )


def test_sft(triple):
    """12 nats over 7 chosen tokens, 7/3 to a pair: 2, 4 and 6 over 7/3, whose mean is 12 / 7."""
    losses = losses_of(triple, Step(tokens_per_pair=7 / 3), name="sft")
    assert losses == close(0.8571429, 1.7142857, 2.5714286)
    assert sum(losses) / 3 == pytest.approx(12 / 7)


def test_mixture(triple):
    """0.5 dpo + 2 apo_zero_unpaired, half of apo_zero for a pair: 0.5 * 0.0485874 + 0.3881443, ..."""
    parts = [
        {"weight": 0.5, "loss": {"name": "dpo", "beta": 1}},
        {"weight": 2, "loss": {"name": "apo_zero_unpaired", "beta": 1}},
    ]
    output = parse_loss({"name": "mixture", "parts": parts})(triple, Step())
    assert output.losses.tolist() == close(0.412438, 1.3465736, 3.1361494)
    assert output.metrics["dpo/loss"].tolist() == close(0.0485874, 0.6931472, 3.0485874)
    assert output.metrics["apo_zero_unpaired/loss"].tolist() == close(0.1940721, 0.5, 0.8059279)
    assert output.rewards.tolist() == [1, 0, -1, -2, 0, 2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # beta times the log-ratios 1, 0, -1, -2, 0, 2, also where the loss divides them by lengths.
        ("dpo", [0.5, 0, -0.5, -1, 0, 1]),
        ("dpo_norm", [0.5, 0, -0.5, -1, 0, 1]),
        ("ipo", [0.5, 0, -0.5, -1, 0, 1]),
        ("nca", [0.5, 0, -0.5, -1, 0, 1]),
        ("bco", [0.5, 0, -0.5, -1, 0, 1]),
        # beta times the mean log-probs -1, -1, -6, -1.25, -2, -1.5.
        ("simpo", [-0.5, -0.5, -3, -0.625, -1, -0.75]),
        ("orpo", [-0.5, -0.5, -3, -0.625, -1, -0.75]),
        # beta times the summed log-probs.
        ("cpo", [-1, -2, -3, -2.5, -2, -1.5]),
    ],
)
def test_rewards(triple, name, expected):
    """beta = 0.5."""
    assert parse_loss({"name": name, "beta": 0.5})(triple, Step()).rewards.tolist() == expected
