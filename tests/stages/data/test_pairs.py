"""Ranked lists: which rows are compared, by hand and through a step, against pairs prepared as pairs."""

import numpy as np
import pytest
import torch

from stages.data.pairs import Pairs, best_and_worst, comparisons
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.scorer import Scorer
from stages.losses import parse_loss
from stages.runtime.compute import Compute
from stages.runtime.distributed import World
from stages.train.step.row_scorer import RowScorer
from stages.train.step.step import accumulate_step, evaluate
from tests.stages.train.step.test_step import BUDGETS, assert_same, make_model, make_reference
from tests.stages.train.step.test_step import step_of as split_step

NUM_EXAMPLES = 16
SCORES = (2.0, -1.0, 3.5, 2.0)


def ranked_examples(scores_of=lambda number: SCORES) -> list[Example]:
    """Sixteen lists of four partly masked completions of uneven lengths."""
    random = np.random.default_rng(7)

    def draw(length: int) -> np.ndarray:
        return random.integers(3, 90, length).astype(np.int32)

    examples = []
    for number in range(NUM_EXAMPLES):
        rows = []
        for score in scores_of(number):
            ids = draw(int(random.integers(2, 14)))
            mask = random.random(len(ids)) < 0.8
            mask[-1] = True
            rows.append(Row("ranked", ids, mask, score))
        examples.append(Example(str(number), f"made:{number}", draw(int(random.integers(2, 20))), rows))
    return examples


def with_mismatched(examples: list[Example], donors: list[list[Row]]) -> RowSet:
    """The examples, each with mismatched rows from the next."""
    made = [
        Example(
            example.example_id,
            example.source,
            example.prompt_ids,
            [
                *example.rows,
                *(Row("mismatched", row.ids, row.mask) for row in donors[(n + 1) % len(examples)]),
            ],
        )
        for n, example in enumerate(examples)
    ]
    return RowSet([to_table(made, [0] * len(made))])


@pytest.fixture(scope="module")
def lists_and_pairs(tmp_path_factory):
    """The same data as ranked lists and as best_worst prepares it, and a reference for both."""
    ranked = ranked_examples()
    ends = [[example.rows[2], example.rows[1]] for example in ranked]  # SCORES: best and worst
    pairs = [
        Example(
            e.example_id,
            e.source,
            e.prompt_ids,
            [Row(r, x.ids, x.mask, x.score) for r, x in zip(("chosen", "rejected"), rows, strict=True)],
        )
        for e, rows in zip(ranked, ends, strict=True)
    ]
    lists = with_mismatched(ranked, ends)
    return lists, with_mismatched(pairs, ends), make_reference(lists, tmp_path_factory.mktemp("reference"))


def step_of(block: dict, rows: RowSet, reference, budget: int = 4096, pairs="best_worst"):
    """Gradient, metrics, next state and forwards of a step in one process."""
    return split_step(block, rows, reference, budget, World(), pairs)


def test_strategies_by_hand() -> None:
    """Scores 2, -1, 3.5, 2: places from the best down are 2, 0, 3, 1, and 0 and 3 are a tie."""
    assert best_and_worst(SCORES) == (2, 1)
    assert best_and_worst([1.0, 1.0, 0.0, 0.0]) == (0, 2)
    assert comparisons(SCORES, "best_worst") == [(2, 1)]
    assert comparisons(SCORES, "adjacent") == [(2, 0), (0, 3), (3, 1)]
    assert comparisons(SCORES, "all") == [(2, 0), (2, 3), (2, 1), (0, 3), (0, 1), (3, 1)]


def test_ties_are_left_out_and_only_compared_rows_are_scored() -> None:
    examples = ranked_examples()[:3]
    rows = RowSet([to_table(examples, [0, 0, 0])])
    by_strategy = {strategy: Pairs(rows, strategy) for strategy in ("best_worst", "adjacent", "all")}
    pairs = {strategy: (found.of(1) - 4).tolist() for strategy, found in by_strategy.items()}
    assert pairs == {
        "best_worst": [[2, 1]],
        "adjacent": [[2, 0], [3, 1]],
        "all": [[2, 0], [2, 3], [2, 1], [0, 1], [3, 1]],
    }
    fed = {strategy: (found.scored(1) - 4).tolist() for strategy, found in by_strategy.items()}
    assert fed == {"best_worst": [2, 1], "adjacent": [2, 0, 3, 1], "all": [2, 0, 3, 1]}
    assert (
        by_strategy["best_worst"]
        .summary()
        .endswith("3 pairs (best_worst) from 3 training examples, 0 pairs of equal scores left out")
    )
    assert (
        by_strategy["all"]
        .summary()
        .endswith("15 pairs (all) from 3 training examples, 3 pairs of equal scores left out")
    )
    numbers = np.concatenate([by_strategy["adjacent"].scored(example) for example in (2, 0)])
    found = by_strategy["adjacent"].among(numbers)
    assert numbers[found].tolist() == [[10, 8], [11, 9], [2, 0], [3, 1]]


def test_a_pair_of_equal_scores_stays_a_pair() -> None:
    """Only what the scores alone rank is left out; a chosen row was chosen, whatever its score."""
    ids, mask = np.arange(4, dtype=np.int32), np.ones(4, bool)
    examples = [
        Example("0", "made:0", ids, [Row("chosen", ids, mask, 1.0), Row("rejected", ids[1:], mask[1:], 1.0)]),
        Example("1", "made:1", ids, [Row("undesirable", ids, mask)]),
    ]
    pairs = Pairs(RowSet([to_table(examples, [0, 0])]), "all")
    assert pairs.of(0).tolist() == [[0, 1]]
    assert pairs.of(1).tolist() == []
    assert pairs.scored(1).tolist() == [2]
    assert pairs.summary() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [{"name": name} for name in ("dpo", "odpo", "aot", "kto", "bco", "simpo", "sft", "wpo")]
    + [
        {"name": "dpo", "ld_alpha": 0.3},
        {"name": "mixture", "parts": [{"loss": {"name": "bco"}}, {"loss": {"name": "dpo"}}]},
    ],
    ids=str,
)
def test_best_worst_of_a_list_is_the_pair_of_its_ends_to_the_bit(block, lists_and_pairs) -> None:
    lists, pairs, reference = lists_and_pairs
    found, wanted = step_of(block, lists, reference), step_of(block, pairs, reference)
    assert found[0].norm() > 0
    assert torch.equal(found[0], wanted[0])
    assert found[1:] == wanted[1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "odpo", "aot", "sft"])
def test_the_split_changes_nothing_with_all_pairs(name, lists_and_pairs) -> None:
    lists, _, reference = lists_and_pairs
    whole, half, single = (
        step_of({"name": name}, lists, reference, budget, "all") for budget in (4096, 400, 1)
    )
    assert whole[3] < half[3] < single[3]
    assert_same(half, whole)
    assert_same(single, whole)
    assert BUDGETS["1x8"] == 4096


@pytest.mark.slow
def test_a_step_of_all_pairs_is_the_mean_over_pairs(lists_and_pairs) -> None:
    """Each of the five pairs of a list as an example of its own gives the same gradient and metrics."""
    lists, _, reference = lists_and_pairs
    alone = []
    for number, example in enumerate(ranked_examples()):
        for index, places in enumerate([(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)]):
            rows = [
                Row(role, example.rows[place].ids, example.rows[place].mask, example.rows[place].score)
                for role, place in zip(("chosen", "rejected"), places, strict=True)
            ]
            alone.append(Example(f"{number}-{index}", example.source, example.prompt_ids, rows))
    pairs = RowSet([to_table(alone, [0] * len(alone))])
    for name in ("dpo", "odpo", "aot", "sft", "orpo"):
        block = {"name": name, **({"nll_span": "sequence"} if name == "orpo" else {})}
        found = step_of(block, lists, reference, pairs="all")
        wanted = step_of(block, pairs, reference)
        assert found[3] <= wanted[3]
        assert_same(found, wanted)


@pytest.mark.slow
def test_evaluation_measures_the_same_pairs(lists_and_pairs) -> None:
    lists, _, reference = lists_and_pairs
    loss = parse_loss({"name": "odpo"})
    scorer = Scorer(make_model(0), Compute(torch.device("cpu"), torch.float32, 200), print)
    row_scorer = RowScorer(scorer, lists, reference, loss, World(), "adjacent")
    evaluated = evaluate(row_scorer, loss, range(NUM_EXAMPLES), {})
    stepped, _ = accumulate_step(row_scorer, loss, range(NUM_EXAMPLES), {})
    assert evaluated.keys() - stepped.keys() == {"accuracies/1-64", "length_bias"}
    assert {name: evaluated[name] for name in stepped} == pytest.approx(stepped, rel=1e-5, abs=1e-6)
