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


def test_classes_of_unequal_size_are_balanced() -> None:
    """Ten times as many bad answers to the same kind of prompts say nothing about the prompts."""
    new = rows_of({(1, "undesirable"): 100}, seed=1)
    ratios = DensityRatios(rows_of({(1, "desirable"): 100, (1, "undesirable"): 1000})).of(new)[::2]
    assert 0.7 < np.median(ratios) < 1.4


def test_rows_of_one_kind_are_an_error() -> None:
    with pytest.raises(DataError, match=r"3 desirable and 0 undesirable completions; loss.udm compares"):
        DensityRatios(rows_of({(1, "desirable"): 3}))
