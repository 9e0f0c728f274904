"""A step's gradient and metrics do not depend on how the step is split, for every loss there is."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from cache.ref_logps import RefLogps
from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packing import pack_lengths
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.losses import LOSSES, parse_loss
from stages.runtime.compute import Compute
from stages.runtime.distributed import World, join_world
from stages.settings.train import PairStrategy
from stages.train.step.row_scorer import RowScorer
from stages.train.step.step import accumulate_step, evaluate
from tests.forked import on_two_ranks
from tests.tiny_llama import random_llama

NUM_EXAMPLES = 8
# One pack of everything, about two packs, and a pack for each example.
BUDGETS = {"1x8": 4096, "2x4": 120, "8x1": 1}
EXTRA = {
    "mixture": {
        "parts": [{"weight": 0.7, "loss": {"name": "dpo"}}, {"weight": 0.5, "loss": {"name": "sft"}}]
    },
    "orpo_sequence": {"name": "orpo", "nll_span": "sequence"},
    "aot_and_orpo_sequence": {
        "name": "mixture",
        "parts": [{"loss": {"name": "aot"}}, {"loss": {"name": "orpo", "nll_span": "sequence"}}],
    },
    "bco_udm": {"name": "bco", "udm": True},
    "ld_dpo": {"name": "dpo", "ld_alpha": 0.4, "sft_weight": 0.2},
    "bco_and_kto": {
        "name": "mixture",
        "parts": [{"weight": 1.0, "loss": {"name": "bco"}}, {"weight": 0.5, "loss": {"name": "kto"}}],
    },
}
BLOCKS = {
    **{name: {"name": name, **EXTRA.get(name, {})} for name in LOSSES},
    **{k: v for k, v in EXTRA.items() if "name" in v},
}


def make_rows() -> RowSet:
    """Eight pairs of uneven lengths with partly masked completions, scores, and mismatched rows."""
    random = np.random.default_rng(5)

    def draw(length: int) -> np.ndarray:
        return random.integers(3, 90, length).astype(np.int32)

    examples = []
    for number in range(NUM_EXAMPLES):
        rows = []
        for role, score in (("chosen", 2.0 + number), ("rejected", 1.0)):
            ids = draw(int(random.integers(2, 14)))
            mask = random.random(len(ids)) < 0.8
            mask[-1] = True
            rows.append(Row(role, ids, mask, score))
        examples.append(Example(str(number), f"made:{number}", draw(int(random.integers(2, 20))), rows))
    matched = [list(example.rows) for example in examples]
    for number, example in enumerate(examples):
        donor = number - number % 4 + (number + 1) % 4
        example.rows += [Row("mismatched", row.ids, row.mask) for row in matched[donor]]
    return RowSet([to_table(examples, [number // 4 for number in range(NUM_EXAMPLES)])])


def make_model(seed: int) -> torch.nn.Module:
    return random_llama(
        seed,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )


def make_reference(rows: RowSet, folder) -> RefLogps:
    """Log-probs of another random model, so that log-ratios are far from zero."""
    reference = RefLogps(folder, {"made": "for the test"})
    scorer = Scorer(make_model(1), Compute(torch.device("cpu"), torch.float32, 4096), print)
    batch = build_pack(rows, [np.arange(a, b) for a, b in zip(rows.starts, rows.ends, strict=True)])
    with torch.no_grad():
        values = scorer(batch).completion_logps.numpy()
    pieces = np.split(values, np.cumsum(rows.completion_lengths[batch.rows])[:-1])
    found = {rows.keys[row]: piece for row, piece in zip(batch.rows, pieces, strict=True)}
    reference.add(list(found), list(found.values()))
    return reference


def make_lists() -> RowSet:
    """Eight ranked lists of two to five completions; two of each list have one score, the second list has one score."""
    random = np.random.default_rng(6)
    examples = []
    for number in range(8):
        completions = [random.integers(3, 90, int(random.integers(2, 9))) for _ in range(2 + number % 4)]
        scores = [0.0 if number == 1 else float(max(1, place)) for place in range(len(completions))]
        rows = [
            Row("ranked", ids.astype(np.int32), np.ones(len(ids), bool), score)
            for ids, score in zip(completions, scores, strict=True)
        ]
        prompt = random.integers(3, 90, 5).astype(np.int32)
        examples.append(Example(str(number), f"made:{number}", prompt, rows))
    return RowSet([to_table(examples, list(range(8)))])


@cache
def the_scorer() -> Scorer:
    """One for all tests, because the check of a new one takes longer than a step; no test changes the weights."""
    return Scorer(make_model(0), Compute(torch.device("cpu"), torch.float32, 4096), print)


def step_of(
    block: dict,
    rows: RowSet,
    reference: RefLogps,
    budget: int,
    world: World,
    pairs: PairStrategy = "best_worst",
):
    """Gradient, metrics and next state of a step: of the second one for losses that keep a state."""
    loss = parse_loss(block)
    scorer = the_scorer()
    scorer.compute = replace(scorer.compute, tokens_per_batch=budget)
    scorer.forwards, model = 0, scorer.model
    ratios = np.linspace(0.5, 2, len(rows), dtype=np.float32) if "density_ratios" in loss.needs else None
    row_scorer = RowScorer(
        scorer, rows, reference if loss.needs_reference else None, loss, world, pairs, ratios
    )
    state: dict[str, float] = {}
    metrics: dict[str, float] = {}
    for _ in range(2 if loss.keeps_state else 1):
        model.zero_grad()
        metrics, state = accumulate_step(row_scorer, loss, range(rows.num_examples), state)
    world.sum_gradients(model.parameters())
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return gradient.double(), metrics, state, scorer.forwards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rows = make_rows()
    return rows, make_reference(rows, tmp_path_factory.mktemp("reference"))


def assert_same(found, wanted) -> None:
    gradient, metrics, state, _ = found
    expected_gradient, expected_metrics, expected_state, _ = wanted
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert state == pytest.approx(expected_state, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_the_split_into_micro_batches_changes_nothing(name: str, made) -> None:
    rows, reference = made
    block = BLOCKS[name]
    whole = step_of(block, rows, reference, BUDGETS["1x8"], World())
    assert whole[0].norm() > 0
    assert all(np.isfinite(list(whole[1].values())))
    for budget in (BUDGETS["2x4"], BUDGETS["8x1"]):
        split = step_of(block, rows, reference, budget, World())
        assert split[3] > whole[3]
        assert_same(split, whole)


LISTWISE = [name for name, cls in LOSSES.items() if cls.unit == "list"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LISTWISE, "dpo"])
def test_the_split_of_ranked_lists_changes_nothing(name: str, tmp_path) -> None:
    rows = make_lists()
    reference = make_reference(rows, tmp_path)
    block = {"name": name, **({"alpha": 2} if name == "infonca" else {})}
    whole = step_of(block, rows, reference, BUDGETS["1x8"], World(), pairs="all")
    assert whole[0].norm() > 0
    for budget in (60, BUDGETS["8x1"]):
        split = step_of(block, rows, reference, budget, World(), pairs="all")
        assert split[3] > whole[3]
        assert_same(split, whole)


@pytest.mark.slow
def test_a_ranked_list_s_loss_is_the_one_of_transformers_log_probs(tmp_path) -> None:
    """Every row alone through the plain model: the ranking of each list as DPO's appendix A.3 writes it."""
    rows = make_lists()
    reference = make_reference(rows, tmp_path)

    @torch.no_grad()
    def logp(model: torch.nn.Module, row: int) -> float:
        ids = torch.from_numpy(np.concatenate([rows.prompt(row), rows.completion(row)])).long()[None]
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        start = int(rows.prompt_lengths[row]) - 1
        return float(logps[start:].gather(1, ids[0, start + 1 :, None]).sum())

    policy, other = make_model(0), make_model(1)
    losses = []
    for start, end in zip(rows.starts, rows.ends, strict=True):
        rewards = {row: 0.1 * (logp(policy, row) - logp(other, row)) for row in range(start, end)}
        losses.append(
            sum(
                np.log(sum(np.exp(rewards[j]) for j in rewards if j == i or rows.scores[j] < rows.scores[i]))
                - rewards[i]
                for i in rewards
            )
        )
    _, metrics, _, _ = step_of({"name": "plackett_luce"}, rows, reference, 60, World(), pairs="all")
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_budgets_make_the_numbers_of_packs_in_their_names() -> None:
    rows = make_rows()
    lengths = [
        int(rows.prompt_lengths[a] + (rows.completion_lengths[a : a + 2] - 1).sum()) for a in rows.starts
    ]
    assert [len(pack_lengths(lengths, budget)) for budget in BUDGETS.values()] == [1, 2, 8]


def test_sums_of_a_whole_step_are_those_of_its_packs_to_the_bit(made) -> None:
    """Rounded to float32 on the way, the log-ratio of a long completion would be off."""
    rows, reference = made
    row_scorer = RowScorer(the_scorer(), rows, reference, parse_loss({"name": "aot"}), World())
    groups = [rows.example_rows(example, mismatched=False) for example in range(NUM_EXAMPLES)]
    found = row_scorer.score_all(groups)
    assert found.logps.dtype == torch.float64
    for pack in row_scorer.packs(groups):
        places = [int(np.flatnonzero(np.concatenate(groups) == row)[0]) for row in pack.rows]
        alone = row_scorer.score(pack)
        for name in ("logps", "ref_logps"):
            assert torch.equal(found.get(name)[places], alone.get(name))


@pytest.mark.slow
def test_evaluation_is_a_step_without_a_gradient(made) -> None:
    """Held-out metrics of a set of examples are those of a step on the same examples."""
    rows, reference = made
    for name in ("dpo", "kto", "simpo", "aot"):
        loss = parse_loss({"name": name})
        scorer = Scorer(make_model(0), Compute(torch.device("cpu"), torch.float32, 200), print)
        row_scorer = RowScorer(scorer, rows, reference if loss.needs_reference else None, loss, World())
        evaluated = evaluate(row_scorer, loss, range(NUM_EXAMPLES), {})
        stepped, _ = accumulate_step(row_scorer, loss, range(NUM_EXAMPLES), {})
        assert evaluated.keys() - stepped.keys() == {"accuracies/1-64", "length_bias"}
        assert {key: evaluated[key] for key in stepped} == pytest.approx(stepped, rel=1e-5, abs=1e-6)


def test_evaluating_more_examples_changes_no_loss_of_those_before(made) -> None:
    """bco's delta is the training steps' mean reward: two halves' held-out losses are the whole's."""
    rows, reference = made
    loss = parse_loss({"name": "bco"})
    scorer = Scorer(make_model(0), Compute(torch.device("cpu"), torch.float32, 200), print)
    row_scorer = RowScorer(scorer, rows, reference, loss, World())
    state = {"reward_sum": 3.0, "reward_count": 20.0}
    parts = [range(2), range(2, 8), range(8)]
    first, second, whole = (evaluate(row_scorer, loss, part, state) for part in parts)
    assert [part["delta"] for part in (first, second, whole)] == pytest.approx([0.15] * 3)
    assert whole["loss"] == pytest.approx((first["loss"] + 3 * second["loss"]) / 4, rel=1e-6)


@pytest.mark.slow
def test_a_split_by_examples_would_be_wrong_for_whole_step_losses(made) -> None:
    """The protection is needed: aot's ranks within micro-batches give another gradient."""
    rows, reference = made
    loss = parse_loss({"name": "aot"})
    model = make_model(0)
    scorer = Scorer(model, Compute(torch.device("cpu"), torch.float32, 4096), print)
    row_scorer = RowScorer(scorer, rows, reference, loss, World())
    for half in (range(4), range(4, 8)):
        accumulate_step(row_scorer, loss, half, {})
    naive = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double() / 2
    exact = step_of({"name": "aot"}, rows, reference, 4096, World())[0]
    assert (naive - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.slow
def test_two_ranks_change_nothing(made, tmp_path) -> None:
    """Real gloo ranks, each with its own share of the packs, against one process."""
    rows, reference = made

    def work() -> None:
        world = join_world(torch.device("cpu"))
        found = {name: step_of(block, rows, reference, 120, world) for name, block in BLOCKS.items()}
        if world.is_main:
            torch.save(found, tmp_path / "found.pt")

    errors = tmp_path / "errors.txt"
    assert on_two_ranks(work, errors) == [0, 0], errors.read_text()
    found = torch.load(tmp_path / "found.pt")
    for name, block in BLOCKS.items():
        assert_same(found[name], step_of(block, rows, reference, BUDGETS["1x8"], World()))
