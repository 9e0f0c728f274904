"""Expected values that other projects publish in their own tests; inputs and results only, no code."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.losses import LOSSES, Step, parse_loss

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config_of(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


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


def test_the_run_of_mixture_is_mpo(pairs):
    """OpenGVLab/InternVL 2410d1d (MIT) internvl/train/trainer_dpo.py and shell/internvl2.5_mpo, in float64.

    0.8 of DPO, 0.2 of both sides of BCO with its running mean, 1 of the NLL per token of a pair's chosen completion
    (one pair on a device there, so their mean over tokens is each pair's).
    """
    logps = torch.tensor([-12.0, -30.5, -7.1, -15.0, -28.0, -9.4], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([-13.0, -30.0, -8.0, -14.0, -29.0, -9.0], dtype=torch.float64)
    num_chosen = torch.tensor([6.0, 12.0, 3.0], dtype=torch.float64)
    rewards = 0.1 * (logps - ref_logps)
    chosen, rejected = rewards.chunk(2)
    delta = rewards.detach().mean()

    def minus_log_sigmoid(x):
        return torch.log1p(torch.exp(-x))

    expected = 0.8 * minus_log_sigmoid(chosen - rejected) - logps[:3] / num_chosen
    expected = expected + 0.2 * (minus_log_sigmoid(chosen - delta) + minus_log_sigmoid(delta - rejected))
    (slopes,) = torch.autograd.grad(expected.mean(), logps)

    batch = pairs([0.0] * 3, [0.0] * 3, ref_logps[:3], ref_logps[3:], num_tokens=([6, 12, 3], [5, 14, 4]))
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, logps=logps))
    output = parse_loss(config_of("mixture")["loss"])(batch, Step())
    torch.testing.assert_close(output.losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(output.losses.mean(), logps)[0], slopes, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(
    ("name", "fields", "learning_rate", "batch_size"),
    [
        # wzhouad/WPO a104458 training_configs/llama3_instruct.yaml: 8 GPUs x 2 x 8 pairs.
        ("wpo", {"beta": 0.01}, 1e-6, 128),
        # haozheji/exact-optimization a8ab360 exp/hh_exp/train_exo.sh, src/align_stage/loss.py (log_epsilon = -10).
        ("exo", {"beta": 0.5, "label_smoothing": math.exp(-10)}, 1e-6, 64),
        # princeton-nlp/SimPO 1b3e8f3 training_configs/llama-3-8b-base-simpo.yaml: 4 GPUs x 2 x 16 pairs.
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, 6e-7, 128),
        # uclaml/SPPO 5e61c4e scripts/pipeline.sh: 8 GPUs x 8 pairs.
        ("sppo", {"beta": 1e-3}, 5e-7, 64),
    ],
)
def test_defaults_and_runs_are_those_of_the_authors_files(name, fields, learning_rate, batch_size):
    """The runs share a batch of 64; what else they state is the authors'."""
    cls, run = LOSSES[name], config_of(name)
    assert (cls.learning_rate, cls.batch_size) == (learning_rate, batch_size)
    for values in (cls().model_dump(), run["loss"]):
        assert {field: values[field] for field in fields} == pytest.approx(fields, rel=1e-3)
    assert run["train"]["learning_rate"] == learning_rate
    assert run["train"].get("optimizer", "adamw") == ("rmsprop" if name == "sppo" else "adamw")
