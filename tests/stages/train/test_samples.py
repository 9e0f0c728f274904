"""Which prompts a step samples, and how degenerate output is measured."""

import pytest

from stages.train.samples import SampleRecord, choose, repetition, sample_metrics


def test_each_strategy_chooses_its_prompts() -> None:
    assert [choose("fixed", 5, 2, n, 0) for n in range(3)] == [[0, 1]] * 3
    assert [choose("round_robin", 5, 2, n, 0) for n in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    drawn = [choose("random", 50, 4, n, 0) for n in range(20)]
    assert drawn == [choose("random", 50, 4, n, 0) for n in range(20)]
    assert drawn != [choose("random", 50, 4, n, 1) for n in range(20)]
    assert all(len(set(places)) == 4 for places in drawn)
    assert len({place for places in drawn for place in places}) > 30


@pytest.mark.parametrize("strategy", ["fixed", "round_robin", "random"])
def test_all_prompts_of_a_small_pool_are_sampled(strategy) -> None:
    assert sorted(choose(strategy, 3, 8, 5, 0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 7, 0.75), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition_counts_4_grams_seen_before(ids, share) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_metrics_of_samples() -> None:
    records = [
        SampleRecord(0, "p", "prompt", completion, "length", tokens)
        for completion, tokens in [(" \n", 1), ("aaaa", 7)]
    ]
    assert sample_metrics(records, [[0], [7] * 7], [True, False]) == {
        "samples/mean_tokens": 4.0,
        "samples/empty_share": 0.5,
        "samples/repetition_share": 0.375,
        "samples/nonfinite_share": 0.5,
    }
