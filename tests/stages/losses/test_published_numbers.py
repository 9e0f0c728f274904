"""Expected values that other projects publish in their own tests; inputs and results only, no code."""

import numpy as np
import pytest
import torch

from stages.losses import Step, parse_loss

# torchtune bd2a0fc (BSD-3) tests/torchtune/rlhf/loss/test_dpo_loss.py: chosen, rejected, ref chosen, ref rejected.
TORCHTUNE = ([-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0], [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1])
# An unnamed public repository's tests (text index file 55937653141).
OTHER = ([-12.0, -8.0, -6.0], [-15.0, -7.0, -10.0], [-13.0, -9.0, -7.0], [-14.0, -6.0, -11.0])


@pytest.mark.parametrize(
    ("block", "inputs", "expected"),
    [
        ({"name": "dpo", "beta": 0.1}, TORCHTUNE, [0.6931472, 0.3132617, 0.126928]),
        ({"name": "hinge", "beta": 0.1}, TORCHTUNE, [1.0, 0.0, 0.0]),
        # torchtune b74be005b, where the inputs stand for averages: one token each; gamma 0.5 is a ratio of 0.25.
        (
            {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.25},
            TORCHTUNE,
            [1.5410085, 7.00435e-18, 7.00435e-18],
        ),
        # torchtune b74be005b, KL term 0: the chosen rows, then the rejected ones.
        ({"name": "kto", "beta": 0.1}, TORCHTUNE, [0.5, 0.4975, 0.5225, 0.5, 0.2709, 0.1101]),
        ({"name": "dpo", "beta": 0.1}, OTHER, [0.598139, 0.598139, 0.693147]),
    ],
)
def test_losses(pairs, block, inputs, expected):
    output = parse_loss(block)(pairs(*inputs), Step(kl=torch.tensor(0.0)))
    assert output.losses.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (TORCHTUNE, [0.0, 0.01, -0.09, 0.0, -0.99, -2.09]),
        (OTHER, [0.1, 0.1, 0.1, -0.1, -0.1, 0.1]),
    ],
)
def test_rewards(pairs, inputs, expected):
    output = parse_loss({"name": "kto", "beta": 0.1})(pairs(*inputs), Step(kl=torch.tensor(0.0)))
    assert output.rewards.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("block", "expected"),
    [({"name": "dpo"}, 0.753059), ({"name": "cdpo", "label_smoothing": 0.3}, 0.925447)],
)
def test_tunix_dpo(pairs, block, expected):
    """google/tunix c7d8950 (Apache-2.0) tests/sft/dpo/dpo_trainer_test.py: eight rows of four tokens, half chosen."""
    random = np.random.RandomState(0)
    logps = random.normal(0, 5, (8, 4)).sum(-1)
    ref_logps = random.normal(0, 5, (8, 4)).sum(-1)
    batch = pairs(logps[:4], logps[4:], ref_logps[:4], ref_logps[4:])
    assert parse_loss(block)(batch, Step()).losses.mean().item() == pytest.approx(expected, abs=1e-5)


def test_tunix_orpo_on_sums(pairs):
    """google/tunix c7d8950 (Apache-2.0) tests/sft/dpo/orpo_trainer_test.py, "prompt loss".

    Sums stand for means there (one token each here), and the NLL is taken of 1.5 times the chosen log-probs.
    """
    logps = -np.abs(np.random.RandomState(0).rand(8, 4)).sum(-1)
    output = parse_loss({"name": "orpo", "beta": 0.1})(pairs(logps[:4], logps[4:]), Step())
    nll = output.metrics["nll"].mean().item()
    assert 1.5 * nll == pytest.approx(3.423784, abs=1e-4)
    assert (output.losses.mean().item() - nll) / 0.1 == pytest.approx(0.708663, abs=1e-4)
    assert output.losses.mean().item() + 0.5 * nll == pytest.approx(3.494651, abs=1e-4)


def test_tunix_orpo_on_means(pairs):
    """As above, on means over completions of 2, 3, 4 and 1 tokens."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]] * 2)
    logps = (-np.abs(np.random.RandomState(0).rand(8, 4)) * mask).sum(-1)
    lengths = mask.sum(-1)
    batch = pairs(logps[:4], logps[4:], num_tokens=(lengths[:4], lengths[4:]))
    output = parse_loss({"name": "orpo", "beta": 0.1})(batch, Step())
    nll = output.metrics["nll"].mean().item()
    assert nll == pytest.approx(0.592339, abs=1e-4)
    assert output.losses.mean().item() == pytest.approx(0.671129, abs=1e-4)
    assert (output.losses.mean().item() - nll) / 0.1 == pytest.approx(0.7879, abs=1e-4)


def test_open_instruct_average_logps(pairs):
    """allenai/open-instruct e6c3044 (Apache-2.0) open_instruct/test_dpo_utils.py: tokens -1, -2, -3 and -1, -2."""
    batch = pairs([-6.0], [-3.0], num_tokens=([3], [2]))
    assert batch.rows.mean_logps.tolist() == [-2.0, -1.5]
