"""`align plan`: counts that are those of the run, a table a person reads, and warnings instead of refusals."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import tables
from pipeline.commands.plan import Planned
from pipeline.session import Session
from stages.plan.stage import BATCHES, LENGTHS, Cell, MeasuredRun, TrainingPlan
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
    plan = run.run("plan")
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


@pytest.mark.slow
def test_other_budgets_are_those_of_runs_with_them(session_of):
    """A budget that holds every step is the last one shown."""
    plan, larger = (session_of(compute={"tokens_per_batch": budget}).run("plan") for budget in (100, 2048))
    own, other = plan["budgets"]
    assert own == budget_of(plan)
    assert other == budget_of(larger)
    assert other["tokens_per_step"] < own["tokens_per_step"]
    assert other["bytes"] > own["bytes"]
    assert larger["budgets"] == [other]


def budget_of(plan: dict) -> dict:
    """A plan's own budget, as it is in its list of budgets."""
    shown = {name: plan[name] for name in ("tokens_per_batch", "tokens_per_step")}
    return {**shown, "bytes": plan["predicted"]["total"]}


@pytest.mark.slow
def test_a_measured_plan_has_time_and_peak(session_of):
    plan = session_of(adapter={"name": "lora"}).run("plan", measure=True)
    measured = plan["measured"]
    assert measured["tokens_per_second"] > 0
    assert measured["run_seconds"] > 0
    assert measured["predicted_bytes"] == plan["predicted"]["total"]
    if Path("/proc/self/status").exists():
        assert measured["peak_bytes"] is not None


@pytest.mark.slow
def test_what_a_person_sees(session_of, capsys):
    def shown(plan: TrainingPlan) -> str:
        Planned(plan).show(tables.console())
        return capsys.readouterr().out

    planned = Session.run(session_of(), "plan")
    assert isinstance(planned, Planned)
    text = " ".join(shown(planned.plan).split())
    assert "the model has fewer than 512 positions" in text
    assert " MiB" in text
    assert "0.00 GiB" not in text

    table = [Cell(b, n, 3 << 30 if n == 512 else None) for b in BATCHES for n in LENGTHS]
    tight = replace(planned.plan, table=table, available_bytes=2 << 30)
    text = shown(tight)
    assert "1,024 tokens" not in text
    assert "3.00 GiB !" in text
    assert "run out of memory" not in text
    assert "not measured; add --measure" in text
    assert max(len(line) for line in text.splitlines()) <= 100

    measured = MeasuredRun(800.0, 1 << 30, 3 << 30, planned.plan.predicted.total, 200.0, "cpu", 3)
    text = " ".join(shown(replace(tight, measured=measured)).split())
    assert "run out of memory: 3.00 GiB reserved when measured, 2.00 GiB available." in text
    assert "reserved, with freed memory 3.00 GiB" in text

    large = replace(tight, predicted=replace(tight.predicted, activations=5 << 30))
    total = tables.size(large.predicted.total)
    assert f"The run will probably run out of memory: {total} predicted, 2.00 GiB available." in " ".join(
        shown(large).split()
    )
