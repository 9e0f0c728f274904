"""Warnings are functions of the logged lines: each says its numbers where it should, and nothing where not."""

import pytest

from stages.losses import parse_loss
from stages.train.monitoring.health import CHECKS, LONG_WINDOW, WINDOW, Watch, checks_of, warnings_now

HEALTHY = {
    "loss": 0.6,
    "rewards/accuracies": 0.7,
    "logratios/chosen": 0.5,
    "logratios/rejected": -3.0,
    "logps/chosen": -100.0,
    "logps/rejected": -100.0,
    "rewards/margins": 2.0,
    "weights_too_coarse": 0.0,
    "weights_nonfinite": 0.0,
    "kl": 1.0,
    "grad_norm": 2.0,
    "weights_changed": 0.99,
    "learning_rate": 1e-6,
    "samples/mean_tokens": 30.0,
    "samples/empty_share": 0.0,
    "samples/repetition_share": 0.1,
    "samples/nonfinite_share": 0.0,
}


START = {"step": 0, "eval/logps/chosen": -53.0, "eval/nll": 1.0}


def lines(number: int, **changes: float) -> list[dict]:
    return [START, *({"step": step, **HEALTHY, **changes} for step in range(1, number + 1))]


SICK = {
    "both_falling": (
        WINDOW,
        {"logratios/chosen": -20.0, "logps/chosen": -120.0},
        ("-20", "from -100 to -120"),
    ),
    # SimPO at 1e-3 on graded stories: the best margin and the lowest loss, and 19 % wins against the reference.
    "chosen_fallen": (1, {"eval/logps/chosen": -119.0}, ("held out", "from -53 to -119", "75%")),
    "nll_rising": (1, {"nll": 0.5, "eval/nll": 1.1}, ("eval/nll rose to 1.1, from 1",)),
    "margin_beyond": (WINDOW, {"rewards/margins": 14.8}, ("14.8", "below 10")),
    "logratios_beyond": (
        WINDOW,
        {"logratios/chosen": 58.0, "logps/chosen": -10.0},
        ("chosen is +58", "the reference has -68"),
    ),
    "kl_exploding": (WINDOW, {"kl": 51.0}, ("51", "50")),
    "accuracy_at_chance": (LONG_WINDOW, {"rewards/accuracies": 0.52}, ("0.520",)),
    "no_gradient": (1, {"grad_norm": 0.0}, ("step 1",)),
    "weights_unchanged": (WINDOW, {"weights_changed": 0.2, "weights_too_coarse": 0.7}, ("20%", "too small")),
    "weights_nonfinite": (1, {"weights_nonfinite": 0.25}, ("25.00%", "infinite or NaN")),
    "steps_skipped": (2, {"skipped": 1}, ("2 of the last 2",)),
    "samples_degenerate": (
        1,
        {"samples/repetition_share": 0.8, "samples/empty_share": 0.25},
        ("80%", "25%", "30.0"),
    ),
}


def test_a_healthy_run_has_no_warning() -> None:
    for number in range(2 * LONG_WINDOW):
        assert [check(lines(number)) for check in CHECKS] == [""] * len(CHECKS)


def test_every_check_has_its_case() -> None:
    assert [check.__name__ for check in CHECKS] == list(SICK)


@pytest.mark.parametrize("name", SICK)
def test_a_warning_names_the_problem_and_its_numbers(name: str) -> None:
    number, changes, parts = SICK[name]
    found = {check.__name__: check(lines(number, **changes)) for check in CHECKS}
    assert all(part in found[name] for part in parts), found[name]
    assert {other for other, problem in found.items() if problem} == {name}
    if number > 2:
        assert all(check(lines(number - 1, **changes)) == "" for check in CHECKS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("both_falling", {"logratios/chosen": -8.0, "logps/chosen": -108.0}),
        ("both_falling", {"logratios/chosen": -20.0, "logratios/rejected": 1.0, "logps/chosen": -120.0}),
        ("kl_exploding", {"kl": 49.0}),
        ("accuracy_at_chance", {"rewards/accuracies": 0.56}),
        ("weights_unchanged", {"weights_changed": 0.2, "learning_rate": 0.0}),
        ("chosen_fallen", {"eval/logps/chosen": -80.4}),  # DPO at 3e-4 on the stories: 84 % wins
        ("chosen_fallen", {"eval/logps/chosen": -10.0}),
        ("nll_rising", {"nll": 0.5, "eval/nll": 1.01}),
        ("nll_rising", {"eval/nll": 2.0}),  # an evaluation set's metric of no training term
        ("margin_beyond", {"rewards/margins": 9.9}),
        ("logratios_beyond", {"logratios/chosen": 58.0, "logps/chosen": -300.0}),
        ("logratios_beyond", {"logratios/rejected": -90.0, "logps/rejected": -190.0}),
    ],
)
def test_a_metric_just_inside_its_range_is_no_warning(name: str, changes: dict) -> None:
    check = next(check for check in CHECKS if check.__name__ == name)
    assert check(lines(2 * LONG_WINDOW, **changes)) == ""


def test_missing_metrics_are_no_warning() -> None:
    bare = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(50)]
    assert [check(bare) for check in CHECKS] == [""] * len(CHECKS)


def test_a_warning_is_repeated_only_after_a_recovery() -> None:
    watch, history = Watch(parse_loss({"name": "dpo"})), [{"step": 0}]
    said = []
    for step, norm in enumerate([1.0, 0.0, 0.0, 1.0, 0.0], start=1):
        history.append({"step": step, **HEALTHY, "grad_norm": norm})
        said.append(list(watch.new_warnings(history)))
    assert [len(found) for found in said] == [0, 1, 0, 0, 1]
    assert said[1][0].startswith("Warning: grad_norm is 0 at step 2")


def test_weights_that_stay_for_another_reason_are_not_blamed_on_the_learning_rate() -> None:
    check = next(check for check in CHECKS if check.__name__ == "weights_unchanged")
    problem = check(lines(WINDOW, weights_changed=0.2, weights_too_coarse=0.0, grad_norm=3e-12))
    assert "too small" not in problem
    assert "gradients are close to 0 (grad_norm 3e-12)" in problem


def test_without_held_out_rows_the_first_steps_are_the_start() -> None:
    """Reference-free losses too: nothing is read but the policy's own log-probs."""
    bare = [{"step": step, "loss": 0.1, "logps/chosen": -53.0 - 2 * step} for step in range(1, 61)]
    check = next(check for check in CHECKS if check.__name__ == "chosen_fallen")
    assert check(bare[:20]) == ""
    assert "completions fell from -64 to -164" in check(bare)


@pytest.mark.parametrize(
    ("loss", "has_margins"),
    [
        ({"name": "dpo"}, True),
        ({"name": "simpo"}, True),
        ({"name": "dpo_norm"}, False),
        ({"name": "ipo"}, False),
        ({"name": "ipo", "normalize": "sum"}, True),
        ({"name": "apo_zero", "normalize": "mean"}, False),
    ],
)
def test_margins_of_losses_that_divide_by_the_length_have_no_bound(loss: dict, has_margins: bool) -> None:
    names = [check.__name__ for check in checks_of(parse_loss(loss))]
    assert ("margin_beyond" in names) == has_margins
    assert "chosen_fallen" in names


def test_the_watch_of_a_long_run_sees_what_all_its_lines_say() -> None:
    """Step by step it keeps few lines; the warnings of the last step are those of the whole history."""
    loss = parse_loss({"name": "simpo"})
    watch, history, said = Watch(loss), [START], []
    for step in range(1, 301):
        line = {"step": step, **HEALTHY, "logps/chosen": -53.0 - step / 3}
        if step % 90 == 0:
            line |= {"eval/logps/chosen": -53.0 - step / 3, "eval/nll": 1 + step / 1000, "nll": 0.1}
        history.append(line)
        said += watch.new_warnings(history)
    assert [line for line in said if "held out fell from -53 to -113" in line]
    assert any("held out fell from -53 to -143" in line for line in warnings_now(history, loss))
