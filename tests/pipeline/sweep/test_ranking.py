"""The ranking of a sweep: Welch's interval as scipy has it, and how often noise is called the best."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pipeline.sweep.ranking import Setting, Trial, margin, rank

ACCURACY, LOSS = "rewards/accuracies", "loss"


def trials(values: dict[str, list[float]], metric: str = ACCURACY, heldout: int = 0) -> list[Trial]:
    sizes = {metric: heldout} if heldout else {}
    return [
        Trial(name, {"key": name}, {metric: one}, sizes, {"name": "dpo"}, True)
        for name, own in values.items()
        for one in own
    ]


def setting(name: str, values: list[float], metric: str = LOSS, heldout: int = 0) -> Setting:
    return Setting(name, {}, trials({name: values}, metric, heldout))


@pytest.mark.parametrize(("one", "other"), [([1.0, 1.2, 0.9], [0.5, 0.8]), ([3, 4, 5, 9], [3.1, 3.2, 3.0])])
def test_the_noise_of_seeds_is_the_half_width_of_welchs_interval(one, other):
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    found = margin(setting("a", one), setting("b", other), LOSS, comparisons=1)
    assert found == pytest.approx((expected.high - expected.low) / 2, rel=1e-9)


def test_more_comparisons_need_a_larger_difference():
    one, other = setting("a", [1.0, 1.2, 0.9]), setting("b", [0.5, 0.8, 0.6])
    assert margin(one, other, LOSS, 10) > margin(one, other, LOSS, 2) > margin(one, other, LOSS, 1)


def test_held_out_examples_make_a_share_uncertain_whatever_the_seeds_say():
    """With equal seeds the rest is the interval of two shares: p(1-p)/n each, of 4 examples more (Agresti and Coull)."""
    one, other = (setting(name, [0.9, 0.9], ACCURACY, 400) for name in "ab")
    share = (360 + 2) / 404
    expected = stats.t.ppf(0.975, 2 * 403) * np.sqrt(2 * share * (1 - share) / 404)
    assert margin(one, other, ACCURACY, 1) == pytest.approx(expected, rel=1e-9)


def test_a_clear_winner_is_called_the_best():
    found = rank(trials({"a": [0.7, 0.71, 0.69], "b": [0.9, 0.91, 0.89]}, heldout=500), ACCURACY, True)
    assert found.best == "b"
    assert [one.name for one in found.settings] == ["b", "a"]
    assert found.verdict.startswith("Best: b (0.2000 from the next")


@pytest.mark.parametrize(
    ("metric", "loss", "needs_reference", "compares"),
    [
        (ACCURACY, {"name": "kto"}, True, True),
        (ACCURACY, {"name": "simpo"}, False, False),
        (LOSS, {"name": "kto"}, True, False),
        (LOSS, {"name": "dpo"}, True, True),
        ("rewards/margins", {"name": "dpo", "beta": 0.5}, True, False),
        ("kl", {"name": "kto"}, True, True),
        ("win_rate", {"name": "simpo"}, False, True),
    ],
)
def test_values_by_different_rewards_are_not_compared(metric, loss, needs_reference, compares):
    """An accuracy that begins at 0.7 because no reference is subtracted is no better than one of 0.8 that began at 0.5."""
    dpo = trials({"dpo": [0.70, 0.71]}, metric, 2000)
    other = [
        replace(one, setting="other", loss=loss, needs_reference=needs_reference, metrics={metric: 0.9})
        for one in dpo
    ]
    found = rank([*dpo, *other], metric, True)
    assert (found.best == "other") is compares
    assert ("does not compare" in found.verdict) is not compares


def test_a_loss_is_better_where_it_is_lower():
    found = rank(trials({"a": [0.5, 0.51, 0.5], "b": [0.9, 0.91, 0.9]}, LOSS), LOSS, False)
    assert found.best == "a"


def test_a_difference_within_noise_is_said_to_be():
    found = rank(
        trials({"a": [0.90, 0.86], "b": [0.89, 0.87], "c": [0.2, 0.21]}, heldout=100), ACCURACY, True
    )
    assert found.best is None
    assert list(found.close) == ["b"]
    assert "within noise" in found.verdict


def test_a_perfect_accuracy_on_few_examples_is_not_certain():
    found = rank(trials({"a": [1.0, 1.0], "b": [0.96, 0.96]}, heldout=50), ACCURACY, True)
    assert found.best is None


def test_one_seed_calls_nothing_the_best():
    found = rank(trials({"a": [0.99], "b": [0.1]}, heldout=500), ACCURACY, True)
    assert found.best is None
    assert "one seed" in found.verdict
    assert "sweep.seeds" in found.verdict


def test_trainings_without_the_metric_are_left_out():
    both = trials({"a": [0.9, 0.9]}, ACCURACY, 100) + trials({"b": [0.3, 0.4]}, LOSS)
    assert [one.name for one in rank(both, ACCURACY, True).settings] == ["a"]
    assert "fewer than two" in rank(both, ACCURACY, True).verdict


@pytest.mark.slow
def test_noise_is_rarely_called_the_best():
    """Eight equal settings, three seeds, the same 200 held-out examples: at most 5 % of sweeps may name a best one."""
    draw = np.random.default_rng(0)
    named = 0
    for _ in range(300):
        share = draw.binomial(200, 0.7) / 200  # one held-out set for all
        values = {name: list(share + 0.01 * draw.standard_normal(3)) for name in "abcdefgh"}
        named += rank(trials(values, heldout=200), ACCURACY, True).best is not None
    assert named <= 0.05 * 300
