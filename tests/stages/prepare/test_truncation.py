"""Fitting examples into length limits: a table worked out by hand, and what holds for any lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.prepare.truncation import truncate
from stages.settings.data import PrepareSettings


def tokens(length, start=0):
    return np.arange(start, start + length, dtype=np.int32)


def completion(length, start=100):
    """Ids that count up, and a mask that leaves out every third."""
    return tokens(length, start), np.arange(length) % 3 != 2


def cut(lengths, mode, limits):
    """Fit a prompt 0, 1, 2, ... and completions 100, 101, ... of these lengths, given as [prompt, *completions]."""
    max_length, max_prompt_length, max_completion_length = limits
    settings = PrepareSettings(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        truncation_mode=mode,
    )
    return truncate(tokens(lengths[0]), [completion(length) for length in lengths[1:]], settings)


# lengths, (max_length, max_prompt_length, max_completion_length) and what is left, by mode:
# first and last id of the prompt, and the lengths of the completions.
TABLE = [
    ([3, 2, 4], (10, None, None), (0, 2, [2, 4]), (0, 2, [2, 4])),
    ([3, 2, 4], (7, None, None), (0, 2, [2, 4]), (0, 2, [2, 4])),
    # One token too many: the prompt loses its first, or the longer completion its last.
    ([3, 2, 4], (6, None, None), (1, 2, [2, 4]), (0, 2, [2, 3])),
    ([3, 2, 4], (5, None, None), (2, 2, [2, 4]), (0, 2, [2, 2])),
    # One prompt token stays, then the completions are cut too.
    ([3, 2, 4], (4, None, None), (2, 2, [2, 3]), (0, 2, [1, 1])),
    ([3, 2, 4], (2, None, None), (2, 2, [1, 1]), None),
    ([3, 2, 4], (1, None, None), None, None),
    # The limits of the parts come first.
    ([3, 2, 4], (10, 2, None), (1, 2, [2, 4]), (0, 1, [2, 4])),
    ([3, 2, 4], (10, None, 3), (0, 2, [2, 3]), (0, 2, [2, 3])),
    ([3, 2, 4], (6, None, 3), (0, 2, [2, 3]), (0, 2, [2, 3])),
    ([3, 2, 4], (5, 2, 3), (1, 2, [2, 3]), (0, 1, [2, 3])),
    ([3, 2, 4], (4, 2, 3), (2, 2, [2, 3]), (0, 1, [2, 2])),
    ([1, 9, 9], (4, None, None), (0, 0, [3, 3]), (0, 0, [3, 3])),
]


@pytest.mark.parametrize(("lengths", "limits", "keep_end", "keep_start"), TABLE)
def test_table(lengths, limits, keep_end, keep_start):
    for mode, expected in (("keep_end", keep_end), ("keep_start", keep_start)):
        fitted = cut(lengths, mode, limits)
        if expected is None:
            assert fitted is None
            continue
        first, last, completions = expected
        assert (fitted.prompt_ids[0], fitted.prompt_ids[-1]) == (first, last)
        assert [len(ids) for ids, _ in fitted.completions] == completions
        assert fitted.prompt_cut == lengths[0] - (last - first + 1)
        assert fitted.completions_cut == [
            before - now for before, now in zip(lengths[1:], completions, strict=True)
        ]


limit = st.none() | st.integers(1, 12)


@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from(["keep_end", "keep_start"]),
    st.tuples(st.integers(1, 20), limit, limit),
)
def test_whatever_the_lengths(prompt, completions, mode, limits):
    max_length, max_prompt_length, max_completion_length = limits
    fitted = cut([prompt, *completions], mode, limits)
    if fitted is None:
        # Nothing fits beside one prompt token, or beside the prompt that keep_start keeps.
        kept = 1 if mode == "keep_end" else min(prompt, max_prompt_length or prompt)
        assert kept >= max_length
        return
    left = [len(ids) for ids, _ in fitted.completions]
    assert len(fitted.prompt_ids) >= 1
    assert len(fitted.prompt_ids) <= (max_prompt_length or prompt)
    assert all(
        1 <= now <= min(before, max_completion_length or before)
        for now, before in zip(left, completions, strict=True)
    )
    assert len(fitted.prompt_ids) + max(left) <= max_length
    # What is left is one run of the prompt, at its end or its start, and the start of each completion.
    start = prompt - len(fitted.prompt_ids) if mode == "keep_end" else 0
    assert fitted.prompt_ids.tolist() == tokens(prompt)[start : start + len(fitted.prompt_ids)].tolist()
    for length, (ids, mask) in zip(completions, fitted.completions, strict=True):
        whole_ids, whole_mask = completion(length)
        assert ids.tolist() == whole_ids[: len(ids)].tolist()
        assert mask.tolist() == whole_mask[: len(ids)].tolist()
    # What is given up for max_length alone.
    wanted = [min(before, max_completion_length or before) for before in completions]
    if mode == "keep_end" and len(fitted.prompt_ids) > 1:
        assert left == wanted
    if mode == "keep_start":
        assert len(fitted.prompt_ids) == min(prompt, max_prompt_length or prompt)
    # Nothing is given up without need.
    if len(fitted.prompt_ids) < min(prompt, max_prompt_length or prompt) or left != wanted:
        assert len(fitted.prompt_ids) + max(left) == max_length


@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from(["keep_end", "keep_start"]),
)
def test_what_fits_is_left_alone_and_fitting_twice_changes_nothing(prompt, completions, mode):
    limits = (prompt + max(completions), prompt, max(completions))
    fitted = cut([prompt, *completions], mode, limits)
    assert (fitted.prompt_cut, sum(fitted.completions_cut)) == (0, 0)
    short = (max(2, limits[0] // 2), None, None)
    once = cut([prompt, *completions], mode, short)
    if once is not None:
        settings = PrepareSettings(max_length=short[0], truncation_mode=mode)
        twice = truncate(once.prompt_ids, once.completions, settings)
        assert twice is not None
        assert (twice.prompt_cut, sum(twice.completions_cut)) == (0, 0)
