"""Which completion is chosen and which rejected, and when there is no pair."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.online.pairing import NoPair, Scored, pair_of


def completions(*scores: float | None, unfinished: tuple[int, ...] = ()) -> list[Scored]:
    return [Scored((place, 9), score, place not in unfinished) for place, score in enumerate(scores)]


def pair(found: list[Scored], pairing="best_worst", unfinished="worst") -> tuple[int, int] | str:
    try:
        return pair_of(found, pairing, unfinished, random.Random(0))
    except NoPair as reason:
        return str(reason)


@pytest.mark.parametrize(
    ("found", "pairing", "unfinished", "expected"),
    [
        (completions(1, 3, 2), "best_worst", "worst", (1, 0)),
        (completions(2, 2, 2), "best_worst", "worst", "tie"),
        (completions(2, 2, 1), "best_worst", "worst", (0, 2)),
        (completions(None, 2, 1), "best_worst", "worst", (1, 2)),
        (completions(None, 2), "best_worst", "worst", "fewer_than_two_completions"),
        # The longest text has the best score, and did not end.
        (completions(1, 2, 9, unfinished=(2,)), "best_worst", "worst", (1, 2)),
        (completions(1, 2, 9, unfinished=(2,)), "best_worst", "drop", (1, 0)),
        (completions(1, 2, 9, unfinished=(2,)), "best_worst", "keep", (2, 0)),
        (completions(1, 2, unfinished=(0, 1)), "best_worst", "worst", "none_finished"),
        (completions(1, 2, unfinished=(0, 1)), "best_worst", "drop", "fewer_than_two_completions"),
        ([Scored((1,), 1.0, True), Scored((1,), 0.0, True)], "best_worst", "worst", "identical_completions"),
        (completions(2, 2, 2), "best_of_n", "worst", (0, 1)),
        (completions(1, 3, 2), "best_of_n", "worst", (1, 0)),
    ],
)
def test_pairs_by_hand(found, pairing, unfinished, expected):
    assert pair(found, pairing, unfinished) == expected


def test_a_random_other_is_any_that_is_worse():
    found = completions(1, 3, 3, 0)
    drawn = {pair_of(found, "best_random", "worst", random.Random(seed)) for seed in range(40)}
    assert drawn == {(1, 0), (1, 3)}


@given(
    st.lists(st.tuples(st.floats(-5, 5) | st.none(), st.booleans()), max_size=6),
    st.sampled_from(["best_worst", "best_random"]),
    st.sampled_from(["worst", "drop", "keep"]),
)
def test_the_chosen_one_is_better_and_ended_unless_kept(scores, pairing, unfinished):
    found = [Scored((place,), score, finished) for place, (score, finished) in enumerate(scores)]
    result = pair(found, pairing, unfinished)
    if not isinstance(result, str):
        chosen, rejected = (found[place] for place in result)
        assert chosen.score is not None
        assert rejected.score is not None
        assert chosen.finished or unfinished == "keep"
        assert chosen.score > rejected.score or not rejected.finished
