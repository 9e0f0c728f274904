"""`align plan`: counts that are those of the run, a table a person reads, and warnings instead of refusals."""

from pathlib import Path

import pytest

from pipeline.plan import BATCHES, LENGTHS
from pipeline.plan_report import show_plan
from pipeline.run import Session
from tests.pipeline.small_run import session, settings


@pytest.fixture
def session_of(tiny_model, preferences, tmp_path):
    def make(**changes) -> Session:
        run = session(settings(tiny_model, preferences, **changes), tmp_path)
        run.run("prepare")
        return run

    return make


@pytest.mark.slow
def test_steps_and_tokens_are_those_of_the_run(session_of, tmp_path):
    run = session_of(loss={"name": "dpo"}, prepare={"mismatched": False})
    before = sorted(tmp_path.rglob("*"))
    plan = run.training_plan(measured=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["tokens_per_step"] * plan["steps"] == plan["tokens"]
    assert plan["predicted"]["num_trained"] == plan["predicted"]["num_parameters"]
    assert [(cell["batch"], cell["length"]) for cell in plan["table"]] == [
        (b, n) for b in BATCHES for n in LENGTHS
    ]
    assert all(cell["bytes"] is None for cell in plan["table"])  # the model has 256 positions
    run.run("cache-ref")
    trained = run.run("train")
    assert plan["steps"] == trained["steps"]


def test_a_measured_plan_has_time_and_peak(session_of):
    plan = session_of(adapter={"name": "lora"}).training_plan(measured=True)
    measured = plan["measured"]
    assert measured["tokens_per_second"] > 0
    assert measured["run_seconds"] > 0
    assert measured["predicted_bytes"] == plan["predicted"]["total"]
    if Path("/proc/self/status").exists():
        assert measured["peak_bytes"] is not None


def test_what_a_person_sees(session_of, capsys):
    plan = session_of().training_plan(measured=False)
    show_plan(plan)
    shown = " ".join(capsys.readouterr().out.split())
    assert "too few positions for 512 tokens" in shown
    assert " MiB" in shown
    assert "0.00 GiB" not in shown
    for cell in plan["table"]:
        cell["bytes"] = 3 << 30 if cell["length"] == 512 else None
    plan["available_bytes"] = 2 << 30
    show_plan(plan)
    shown = capsys.readouterr().out
    assert "1,024 tokens" not in shown
    assert "3.00 GiB !" in shown
    assert "Out of memory is to be expected" not in shown
    assert "not measured; add --measure" in shown
    assert max(len(line) for line in shown.splitlines()) <= 120
    plan["measured"] = {"peak_bytes": 1 << 30, "held_bytes": 3 << 30, "packs": 3, "device": "cpu"}
    plan["measured"] |= {"tokens_per_second": 800.0, "run_seconds": 200.0}
    show_plan(plan)
    shown = " ".join(capsys.readouterr().out.split())
    assert "to be expected: 3.00 GiB held when measured, 2.00 GiB available." in shown
    assert "held, with what was freed 3.00 GiB" in shown
    del plan["measured"]
    plan["predicted"]["total"] = 5 << 30
    show_plan(plan)
    assert "Out of memory is to be expected: 5.00 GiB predicted, 2.00 GiB available." in " ".join(
        capsys.readouterr().out.split()
    )
