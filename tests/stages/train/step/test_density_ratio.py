"""Weights of undesirable rows by their prompts: what they are on prompts of two kinds, and what they do."""

import numpy as np
import pytest

from cache.errors import DataError
from stages.data.rows import Example, Row, RowSet, to_table
from stages.train.step.density_ratio import DensityRatios


def rows_of(counts: dict[tuple[int, str], int], seed: int = 0) -> RowSet:
    """So many rows for each (kind of prompt, role); a kind has ids of its own, and each row a mismatched one."""
    random = np.random.default_rng(seed)
    answer, kept = np.arange(5, dtype=np.int32), np.ones(5, bool)
    examples = []
    for (kind, role), count in counts.items():
        for _ in range(count):
            prompt = (100 * kind + random.integers(0, 20, 12)).astype(np.int32)
            rows = [Row(role, answer, kept), Row("mismatched", answer[:2], kept[:2])]
            examples.append(Example(f"{len(examples)}", f"made:{len(examples)}", prompt, rows))
    return RowSet([to_table(examples, [0] * len(examples))])


MOSTLY_GOOD, MOSTLY_BAD = 1, 2
COUNTS = {
    (MOSTLY_GOOD, "desirable"): 80,
    (MOSTLY_GOOD, "undesirable"): 20,
    (MOSTLY_BAD, "desirable"): 20,
    (MOSTLY_BAD, "undesirable"): 80,
}


@pytest.mark.slow
def test_undesirable_rows_count_more_where_most_completions_are_desirable() -> None:
    """Four good answers to a bad one make p about 0.8 and p / (1 - p) 4; one to four 0.25, raised to 0.5."""
    rows, new = rows_of(COUNTS), rows_of({(1, "undesirable"): 30, (2, "undesirable"): 30}, seed=1)
    fitted = DensityRatios(rows)
    ratios = fitted.of(new)[::2]
    assert ratios.dtype == np.float32
    assert 2.5 < ratios[:30].mean() < 5.5
    assert ratios.min() == np.median(ratios[30:]) == 0.5
    assert ratios[30:].max() < ratios[:30].mean()
    assert (fitted.of(rows)[rows.roles != "undesirable"] == 1).all()
    assert np.array_equal(fitted.of(new), DensityRatios(rows_of(COUNTS)).of(new))


@pytest.mark.slow
def test_classes_of_unequal_size_are_balanced() -> None:
    """Ten times as many bad answers to the same kind of prompts say nothing about the prompts."""
    new = rows_of({(1, "undesirable"): 100}, seed=1)
    ratios = DensityRatios(rows_of({(1, "desirable"): 100, (1, "undesirable"): 1000})).of(new)[::2]
    assert 0.7 < np.median(ratios) < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [12, 60])
def test_a_true_ratio_of_one_is_one(num_prompts) -> None:
    """Good and bad answers to prompts of one kind; training rows and new ones are judged alike.

    A classifier that judges the rows it was fitted on says 0.7 with 12 prompts and 0.8 with 60.
    """
    found = {"training": [], "new": []}
    for seed in range(5):
        rows = rows_of({(1, "desirable"): num_prompts, (1, "undesirable"): num_prompts}, seed)
        fitted = DensityRatios(rows)
        found["training"].append(fitted.of(rows)[rows.roles == "undesirable"])
        found["new"].append(fitted.of(rows_of({(1, "undesirable"): 100}, seed + 100))[::2])
    for ratios in found.values():
        assert np.exp(np.log(np.concatenate(ratios)).mean()) == pytest.approx(1, abs=0.05)


def test_prompts_without_a_common_token_say_nothing_about_each_other() -> None:
    """Each prompt has a token of its own, so the classifier of the others knows nothing of it: p is 1/2."""
    answer, kept = np.arange(5, dtype=np.int32), np.ones(5, bool)
    examples = [
        Example(f"{i}", f"made:{i}", np.array([i], np.int32), [Row(role, answer, kept)])
        for i, role in enumerate(["desirable", "undesirable"] * 10)
    ]
    rows = RowSet([to_table(examples, [0] * len(examples))])
    assert DensityRatios(rows).of(rows) == pytest.approx(np.ones(20), abs=0.02)


def test_copies_of_a_prompt_are_judged_by_a_classifier_that_saw_none_of_them() -> None:
    """Answers to one prompt are all bad; what the others say of it is 1, whatever its own rows say."""
    answer, kept = np.arange(5, dtype=np.int32), np.ones(5, bool)
    kinds = [(0, "undesirable")] * 6 + [
        (i, role) for i in (1, 2, 3, 4) for role in ("desirable", "undesirable")
    ]
    examples = [
        Example(f"{n}", f"made:{n}", np.array([i], np.int32), [Row(role, answer, kept)])
        for n, (i, role) in enumerate(kinds)
    ]
    rows = RowSet([to_table(examples, [0] * len(examples))])
    assert DensityRatios(rows).of(rows)[:6] == pytest.approx(np.ones(6), abs=0.02)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({(1, "desirable"): 3}, r"3 prompts with desirable and 0 with undesirable completions; loss.udm"),
        (
            {(1, "desirable"): 1, (2, "undesirable"): 9},
            r"1 prompts with desirable and 9 with .*; loss.udm compares two or more of each",
        ),
    ],
)
def test_too_few_prompts_of_a_kind_are_an_error(counts, message) -> None:
    with pytest.raises(DataError, match=message):
        DensityRatios(rows_of(counts))
