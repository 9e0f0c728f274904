import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom

from stages.compare.completions import Completed
from stages.compare.length_control import length_controlled
from stages.compare.text_figures import is_refusal, text_figures
from stages.compare.verdicts import Outcome, Verdict, outcomes
from stages.compare.win_rate import RESAMPLES, position_bias, win_rate


def completed(text, number=0, sample=0, **fields):
    return Completed(str(number), f"Prompt {number}", text, sample, "model", **fields)


def verdict(preference, number=0, order=None, lengths=(1, 1), sample=0, **fields):
    own, other = (completed("x" * length, number, sample) for length in lengths)
    return Verdict(own, other, "judge", "0" * 64, preference=preference, order=order, **fields)


def both_orders(first_order, second_order, number):
    return [
        verdict(first_order, number, "completion_first"),
        verdict(second_order, number, "baseline_first"),
    ]


def test_ties_count_one_half_and_pairs_without_a_verdict_are_left_out():
    values = [1, 1, 0.5, 0, None]
    found = win_rate(outcomes(verdict(value, number) for number, value in enumerate(values)))
    assert (found.wins, found.ties, found.losses, found.without_verdict) == (2, 1, 1, 1)
    assert found.rate == 2.5 / 4


def test_orders_that_disagree_are_a_tie_and_one_without_verdict_leaves_the_pair_out():
    found = outcomes(
        [*both_orders(1, 1, 0), *both_orders(1, 0, 1), *both_orders(0.5, 1, 2), *both_orders(1, None, 3)]
    )
    assert [outcome.preference for outcome in found] == [1, 0.5, 0.5, None]


@pytest.mark.slow
@pytest.mark.parametrize(("wins", "total"), [(30, 100), (8, 20), (200, 400)])
def test_the_interval_is_that_of_the_binomial_distribution(wins, total):
    """Resamples of n independent wins and losses have binomial sums: the quantiles are those of Binomial(n, wins/n) / n.

    The number of resamples below a value is binomial too, so each bound lies between the exact quantiles at levels four of
    its standard errors away.
    """
    found = win_rate(outcomes(verdict(float(number < wins), number) for number in range(total)))
    for bound, level in ((found.low, 0.025), (found.high, 0.975)):
        error = 4 * np.sqrt(level * (1 - level) / RESAMPLES)
        low, high = binom.ppf([level - error, level + error], total, wins / total) / total
        assert low - 1e-12 <= bound <= high + 1e-12


@pytest.mark.slow
def test_samples_of_one_prompt_are_drawn_together():
    """Four equal samples a prompt say no more than one: the interval is that of the prompts, not of four times as many."""
    once = win_rate(outcomes(verdict(float(number < 12), number) for number in range(40)))
    repeated = win_rate(
        outcomes(verdict(float(number < 12), number, sample=k) for number in range(40) for k in range(4))
    )
    assert (repeated.low, repeated.high) == (once.low, once.high)


@pytest.mark.slow
def test_both_turns_of_a_prompt_are_drawn_together():
    def second_turn(number, preference):
        turns = [("user", f"Prompt {number}"), ("assistant", "x"), ("user", "Why?")]
        prompt = [{"role": role, "content": content} for role, content in turns]
        own, other = (Completed(str(number), prompt, text, 0, "model", turn=2) for text in "ab")
        return Verdict(own, other, "judge", "0" * 64, preference=preference)

    values = [float(number < 12) for number in range(40)]
    once = [verdict(value, number) for number, value in enumerate(values)]
    twice = [*once, *(second_turn(number, value) for number, value in enumerate(values))]
    assert len(outcomes(twice)) == 80
    assert win_rate(outcomes(twice)).low == win_rate(outcomes(once)).low


@pytest.mark.slow
def test_the_interval_depends_on_the_seed_alone():
    samples = [(number, sample) for number in range(30) for sample in range(1 + number % 7)]
    found = outcomes(verdict(float(number % 3 == 0), number, sample=sample) for number, sample in samples)
    assert win_rate(found) == win_rate(found)
    assert win_rate(found, seed=1) != win_rate(found)


def drawn_pairs(intercept, slope, number, ties=0.0):
    """Outcomes whose winners are drawn from a logistic model of the difference in length in units of 100 characters."""
    generator = np.random.default_rng(0)
    longer = generator.integers(-300, 400, size=number)
    probability = 1 / (1 + np.exp(-(intercept + slope * longer / 100)))
    values = (generator.random(number) < probability).astype(float)
    values[generator.random(number) < ties] = 0.5
    return [
        Outcome([verdict(value, place, lengths=(400 + extra, 400))])
        for place, (value, extra) in enumerate(zip(values, longer.tolist(), strict=True))
    ]


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_the_length_controlled_rate_is_that_of_another_optimizer(ties):
    pairs = drawn_pairs(0.4, 0.8, 400, ties)
    values = np.array([pair.preference for pair in pairs])
    longer = np.array([len(pair.completion.completion) - len(pair.baseline.completion) for pair in pairs])
    scaled = longer / longer.std()

    def negative_log_likelihood(parameters):
        logits = parameters[0] + parameters[1] * scaled
        return (np.logaddexp(0, -logits) * values + np.logaddexp(0, logits) * (1 - values)).sum()

    expected = minimize(negative_log_likelihood, [0, 0], method="BFGS", options={"gtol": 1e-8}).x
    found = length_controlled(pairs)
    assert found.rate == pytest.approx(1 / (1 + np.exp(-expected[0])), abs=1e-5)
    assert found.slope == pytest.approx(expected[1], abs=1e-4)


@pytest.mark.slow
def test_a_judge_that_loves_length_is_found():
    """Of equally long completions both win half; ours are longer by 50 characters on average, and win more."""
    pairs = drawn_pairs(0.0, 1.5, 2000)
    assert win_rate(pairs).low > 0.55
    found = length_controlled(pairs)
    # Half, within three standard errors of a fit of 2000 pairs.
    assert found.rate == pytest.approx(0.5, abs=0.05)
    assert found.slope > 1


def test_swapping_the_sides_turns_the_length_controlled_rate_around():
    pairs = drawn_pairs(0.4, 0.8, 300)
    swapped = [
        Outcome([verdict(1 - pair.preference, place, lengths=(400, len(pair.completion.completion)))])
        for place, pair in enumerate(pairs)
    ]
    assert length_controlled(swapped).rate == pytest.approx(1 - length_controlled(pairs).rate, abs=1e-6)


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ([(1, 5), (0, 3)], "fewer than 10 pairs"),
        ([(float(place % 2), 5) for place in range(20)], "the same difference in length"),
        ([(1.0, place) for place in range(20)], "one side won every pair"),
        ([(float(place > 9), place) for place in range(20)], "alone decides every pair"),
        ([(float(place < 9), place) for place in range(20)], "alone decides every pair"),
    ],
)
def test_where_there_is_no_length_controlled_rate_the_reason_is_named(pairs, problem):
    found = length_controlled(
        [
            Outcome([verdict(value, place, lengths=(10 + longer, 10))])
            for place, (value, longer) in enumerate(pairs)
        ]
    )
    assert found.rate is None
    assert problem in found.problem


def test_a_judge_that_always_takes_the_first_is_found():
    found = position_bias(outcomes(entry for number in range(10) for entry in both_orders(1, 0, number)))
    assert (found.pairs, found.first_wins, found.disagreements) == (10, 1.0, 10)


def test_a_judge_without_position_bias_has_half_of_its_wins_in_either_place():
    pairs = [*both_orders(1, 1, 0), *both_orders(0, 0, 1), *both_orders(0.5, 0.5, 2), *both_orders(0.5, 1, 3)]
    found = position_bias(outcomes(pairs))
    assert (found.pairs, found.first_wins, found.disagreements) == (4, 2 / 5, 1)
    assert position_bias(outcomes([verdict(1, 0, "completion_first")])) is None


def test_figures_of_texts_worked_by_hand():
    """`a b a b a b` has 2 different words of 6, 2 of 5 different pairs, and 4-grams abab, baba, abab: 1/3 repeated."""
    found = text_figures(
        [
            completed("a b a b a b", finish_reason="length", num_tokens=6),
            completed("I'm sorry, but c", finish_reason="stop", num_tokens=4),
        ]
    )
    # The second has the words i m sorry but c, all new: 5 more words, 4 more pairs.
    assert found.distinct_1 == 7 / 11
    assert found.distinct_2 == 6 / 9
    assert found.repetition == pytest.approx((1 / 3 + 0) / 2)
    assert (found.mean_characters, found.median_characters) == (13.5, 13.5)
    assert (found.mean_tokens, found.unfinished, found.refusals) == (5, 0.5, 0.5)


def test_figures_that_a_file_does_not_have_are_none():
    found = text_figures([completed("Hello", num_tokens=1), completed("")])
    assert (found.mean_tokens, found.unfinished) == (None, None)
    assert text_figures([completed("")]).distinct_1 == 0


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can\u2019t help with that.", True),
        ("I'm sorry, but no.", True),
        ("The word 'sorry' has five letters.", False),
        ("A long answer. " * 20 + "I cannot help more.", False),
    ],
)
def test_refusals_are_found_at_the_beginning(text, refuses):
    assert is_refusal(text) is refuses
