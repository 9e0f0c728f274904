"""Batches of pairs from plain numbers."""

import pytest
import torch

from stages.losses import Batch, Rows


def _pairs(chosen, rejected, ref_chosen=None, ref_rejected=None, *, dtype=torch.float64, **fields):
    """Pair k is row k against row k + (number of pairs); a field is given as (chosen values, rejected values)."""
    num_pairs = len(chosen)
    columns = {"logps": (chosen, rejected), "num_tokens": ([1] * num_pairs, [1] * num_pairs), **fields}
    if ref_chosen is not None:
        columns["ref_logps"] = (ref_chosen, ref_rejected)
    rows = Rows(
        **{key: torch.tensor([*first, *second], dtype=dtype) for key, (first, second) in columns.items()}
    )
    index = torch.arange(num_pairs)
    return Batch(
        rows,
        desirable=torch.arange(2 * num_pairs) < num_pairs,
        chosen=index,
        rejected=index + num_pairs,
        lists=index.repeat(2),
        num_lists=num_pairs,
    )


@pytest.fixture
def pairs():
    return _pairs


@pytest.fixture
def triple():
    """Three pairs to work out by hand.

    D_w = L_w - R_w = 1, 0, -1 and D_l = -2, 0, 2, so h = D_w - D_l = 3, 0, -3.
    d_w = D_w / n_w = 0.5, 0, -1 and d_l = D_l / n_l = -0.5, 0, 1, so d_w - d_l = 1, 0, -2.
    a_w = L_w / n_w = -1, -1, -6 and a_l = L_l / n_l = -1.25, -2, -1.5.
    """
    return _pairs(
        [-2, -4, -6],
        [-5, -4, -3],
        [-3, -4, -5],
        [-3, -4, -5],
        num_tokens=([2, 4, 1], [4, 2, 2]),
    )


def _lists(logratios, scores, *, dtype=torch.float64):
    """A list for each entry, all pairs of unequal scores compared; rows of one token under a reference of 0."""
    flat = [(number, value) for number, values in enumerate(logratios) for value in values]
    graded = torch.tensor([score for values in scores for score in values], dtype=dtype)
    lists = torch.tensor([number for number, _ in flat])
    better = (graded[:, None] > graded[None, :]) & (lists[:, None] == lists[None, :])
    chosen, rejected = better.nonzero().unbind(1)
    logps = torch.tensor([value for _, value in flat], dtype=dtype)
    rows = Rows(logps, torch.ones_like(logps), ref_logps=torch.zeros_like(logps), scores=graded)
    return Batch(rows, torch.ones_like(lists, dtype=torch.bool), chosen, rejected, lists, len(logratios))


@pytest.fixture
def lists():
    return _lists
