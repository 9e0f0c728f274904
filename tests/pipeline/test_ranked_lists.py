"""Ranked lists through the stages: one reference pass for every strategy, and errors that say what to type."""

import hashlib
import json
from pathlib import Path

import pytest

from cache.errors import UsageError
from pipeline.session import Session
from tests.conftest import ANIMALS
from tests.pipeline.small_run import session, settings

NUM_RESPONSES = 4


@pytest.fixture
def graded(tmp_path) -> Path:
    """A file of 12 prompts with four scored responses each, two of them of one score."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Where does the {animal} live?"}],
            "responses": ["Go away.", f"The {animal} lives by the water.", "In a hole.", "It lives here."],
            "rewards": [-1 - number, 2.5, 0, 0],
        }
        for number, animal in enumerate(ANIMALS)
    ]
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def session_of(
    model: Path, data: Path, store: Path, said: list[str] | None = None, **blocks: dict
) -> Session:
    prepare = {"heldout_fraction": 0.5, **blocks.pop("prepare", {})}
    train = {"num_epochs": 1, **blocks.pop("train", {})}
    return session(settings(model, data, prepare=prepare, train=train, **blocks), store, said)


def weights(result: dict) -> str:
    return hashlib.sha256((Path(result["artifact"]) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_one_reference_pass_serves_every_strategy(tiny_model, graded, tmp_path) -> None:
    ranked = {"graded": "ranked"}
    run = session_of(tiny_model, graded, tmp_path / "store", prepare=ranked)
    prepared = run.run("prepare")
    assert prepared["rows_by_role"] == {"ranked": 12 * NUM_RESPONSES, "mismatched": 12 * 2}
    assert run.run("cache-ref")["forwards"] > 0
    policies = {}
    # The pairs are formed before a loss sees them: every strategy with one loss, and the others with one each.
    strategies = {"dpo": ("best_worst", "adjacent", "all"), "odpo": ("adjacent",), "aot": ("all",)}
    for loss in strategies:
        for strategy in strategies[loss]:
            said: list[str] = []
            changes = {"prepare": ranked, "train": {"pairs": strategy}, "loss": {"name": loss}}
            again = session_of(tiny_model, graded, tmp_path / "store", said, **changes)
            assert again.run("cache-ref")["forwards"] == 0
            result = again.run("train")
            assert not result["reused"]
            assert result["audit_max_abs_diff"] == 0.0
            assert result["step0"]["rewards/accuracies"] == 0.5
            policies[loss, strategy] = weights(result)
            lines = [line for line in said if line.startswith("Ranked lists:")]
            examples = prepared["examples"]["train"]
            each, left_out = {"best_worst": (1, 0), "adjacent": (2, 1), "all": (5, 1)}[strategy]
            assert lines == [
                f"Ranked lists: {each * examples} pairs ({strategy}) from {examples} training examples, "
                f"{left_out * examples} pairs of equal scores left out"
            ]
    assert len(set(policies.values())) == len(policies)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["plackett_luce", "infonca", "exo_rw", "qrpo"])
def test_losses_of_lists_train_on_all_completions_of_a_prompt(loss, tiny_model, graded, tmp_path) -> None:
    """From lists of four and from the pairs of best and worst, which are lists of two: other weights, same metrics."""
    policies = []
    for blocks in ({"prepare": {"graded": "ranked"}, "train": {"pairs": "all"}}, {}):
        run = session_of(tiny_model, graded, tmp_path / "store", loss={"name": loss}, **blocks)
        run.run("prepare")
        run.run("cache-ref")
        result = run.run("train")
        assert not result["reused"]
        assert result["step0"]["rewards/accuracies"] == 0.5
        assert result["final"]["rewards/margins"] != 0
        policies.append(weights(result))
    assert policies[0] != policies[1]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto", "bco"])
def test_best_worst_trains_the_same_weights_from_lists_as_from_pairs(
    loss, tiny_model, graded, tmp_path
) -> None:
    found = {}
    for choice in ("best_worst", "ranked"):
        run = session_of(
            tiny_model, graded, tmp_path / "store", prepare={"graded": choice}, loss={"name": loss}
        )
        run.run("prepare")
        run.run("cache-ref")
        result = run.run("train")
        assert not result["reused"]
        found[choice] = weights(result), result["step0"], result["final"]
    assert found["ranked"] == found["best_worst"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "choice", "message"),
    [
        (
            {"name": "kto"},
            "ranked",
            r"Loss kto needs each completion to be desirable or undesirable.*train.pairs=all",
        ),
        ({"name": "bco"}, "ranked", r"Loss bco .*Use --set train.pairs=best_worst"),
        ({"name": "apo_zero_unpaired"}, "ranked", r"Loss apo_zero_unpaired .*train.pairs=best_worst"),
        (
            {"name": "mixture", "parts": [{"loss": {"name": "bco"}}, {"loss": {"name": "dpo"}}]},
            "ranked",
            r"Loss mixture needs each completion.*train.pairs=best_worst",
        ),
        ({"name": "dpo", "ld_alpha": 0.5}, "ranked", r"Loss dpo with ld_alpha .*leave ld_alpha out"),
        (
            {"name": "dpo"},
            "best_worst",
            r"train.pairs=all forms pairs from ranked lists.*prepare.graded=ranked",
        ),
    ],
)
def test_what_cannot_be_compared_by_other_strategies_says_what_to_type(
    loss, choice, message, tiny_model, graded, tmp_path
) -> None:
    run = session_of(
        tiny_model,
        graded,
        tmp_path / "store",
        prepare={"graded": choice},
        train={"pairs": "all"},
        loss=loss,
    )
    run.run("prepare")
    run.run("cache-ref")
    with pytest.raises(UsageError, match=message):
        run.run("train")


@pytest.mark.slow
def test_losses_of_lists_refuse_a_part_of_each(tiny_model, graded, tmp_path) -> None:
    """The default, best_worst, would leave two of four out."""
    run = session_of(
        tiny_model, graded, tmp_path / "store", prepare={"graded": "ranked"}, loss={"name": "infonca"}
    )
    run.run("prepare")
    run.run("cache-ref")
    with pytest.raises(
        UsageError, match=r"Loss infonca compares .* train.pairs=best_worst leaves .* --set train.pairs=all"
    ):
        run.run("train")
