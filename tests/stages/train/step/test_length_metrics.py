"""Length bias and accuracy by length, against numbers worked by hand and numpy's correlation."""

import numpy as np
import pytest
import torch

from stages.losses.contract import Batch, LossOutput, Rows
from stages.train.step.length_metrics import length_metrics


def metrics_of(rewards: list[float], tokens: list[int]) -> dict[str, list[float]]:
    """Rows are chosen, rejected, chosen, rejected, ..."""
    number = len(rewards)
    rows = Rows(logps=torch.zeros(number), num_tokens=torch.tensor(tokens))
    chosen = torch.arange(0, number, 2)
    batch = Batch(
        rows, torch.arange(number) % 2 == 0, chosen, chosen + 1, torch.arange(number) // 2, number // 2
    )
    output = LossOutput(torch.zeros(len(chosen)), torch.tensor(rewards))
    return {name: values.reshape(-1).tolist() for name, values in length_metrics(batch, output).items()}


def test_a_pair_is_in_the_range_of_its_longer_completion() -> None:
    found = metrics_of([1, 0, 0, 1, 2, 2, 1, 0, 1, 0], [64, 3, 3, 65, 256, 10, 1024, 9, 2000, 1])
    assert found["accuracies/1-64"] == [1.0]
    assert found["accuracies/65-256"] == [0.0, 0.5]
    assert found["accuracies/257-1024"] == [1.0]
    assert found["accuracies/1025-"] == [1.0]


def test_length_bias_is_the_correlation_of_margin_and_length_difference() -> None:
    random = np.random.default_rng(0)
    rewards, tokens = random.normal(size=40), random.integers(1, 90, 40)
    found = metrics_of(rewards.tolist(), tokens.tolist())["length_bias"]
    expected = np.corrcoef(rewards[::2] - rewards[1::2], tokens[::2] - tokens[1::2])[0, 1]
    assert found == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "tokens"),
    [([1, 0, 2, 0], [5, 4, 9, 4]), ([0] * 6, [1, 2, 3, 4, 9, 1]), ([1, 0, 2, 0, 3, 0], [5, 4, 6, 5, 7, 6])],
    ids=["two pairs", "equal margins", "equal differences"],
)
def test_an_undefined_correlation_is_left_out(rewards, tokens) -> None:
    assert "length_bias" not in metrics_of(rewards, tokens)


def test_unpaired_rows_have_no_length_metrics() -> None:
    rows = Rows(logps=torch.zeros(3), num_tokens=torch.ones(3))
    empty = torch.zeros(0, dtype=torch.long)
    output = LossOutput(torch.zeros(3), torch.zeros(3))
    batch = Batch(rows, torch.ones(3, dtype=torch.bool), empty, empty, torch.arange(3), 3)
    assert length_metrics(batch, output) == {}
