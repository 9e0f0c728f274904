"""Warnings are functions of the logged lines: each says its numbers where it should, and nothing where not."""

import pytest

from stages.train.monitoring.health import CHECKS, LONG_WINDOW, WINDOW, Watch

HEALTHY = {
    "loss": 0.6,
    "rewards/accuracies": 0.7,
    "logratios/chosen": 0.5,
    "logratios/rejected": -3.0,
    "logps/chosen": -100.0,
    "kl": 1.0,
    "grad_norm": 2.0,
    "weights_changed": 0.99,
    "learning_rate": 1e-6,
    "samples/mean_tokens": 30.0,
    "samples/empty_share": 0.0,
    "samples/repetition_share": 0.1,
    "samples/nonfinite_share": 0.0,
}


def lines(number: int, **changes: float) -> list[dict]:
    return [{"step": 0}, *({"step": step, **HEALTHY, **changes} for step in range(1, number + 1))]


SICK = {
    "both_falling": (
        WINDOW,
        {"logratios/chosen": -20.0, "logps/chosen": -120.0},
        ("-20", "from -100 to -120"),
    ),
    "kl_exploding": (WINDOW, {"kl": 51.0}, ("51", "50")),
    "accuracy_at_chance": (LONG_WINDOW, {"rewards/accuracies": 0.52}, ("0.520",)),
    "no_gradient": (1, {"grad_norm": 0.0}, ("step 1",)),
    "weights_unchanged": (WINDOW, {"weights_changed": 0.2}, ("20%",)),
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
    ],
)
def test_a_metric_just_inside_its_range_is_no_warning(name: str, changes: dict) -> None:
    check = next(check for check in CHECKS if check.__name__ == name)
    assert check(lines(2 * LONG_WINDOW, **changes)) == ""


def test_missing_metrics_are_no_warning() -> None:
    bare = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(50)]
    assert [check(bare) for check in CHECKS] == [""] * len(CHECKS)


def test_a_warning_is_repeated_only_after_a_recovery() -> None:
    watch, history = Watch(), [{"step": 0}]
    said = []
    for step, norm in enumerate([1.0, 0.0, 0.0, 1.0, 0.0], start=1):
        history.append({"step": step, **HEALTHY, "grad_norm": norm})
        said.append(list(watch.new_warnings(history)))
    assert [len(found) for found in said] == [0, 1, 0, 0, 1]
    assert said[1][0].startswith("Warning: grad_norm is 0 at step 2")
