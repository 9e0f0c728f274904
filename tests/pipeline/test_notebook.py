"""The Python interface, as the notebook in docs/ uses it: its cells run, on a small model."""

import json
from pathlib import Path
from typing import Any

import pytest

import pipeline
from cache.errors import UsageError
from pipeline import Session
from pipeline.config import load_config
from tests.pipeline.small_run import ROOT, run, settings

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture
def tree(tiny_model, preferences) -> dict[str, Any]:
    few = {"max_steps": 3, "eval_steps": 1}
    return settings(tiny_model, preferences, train=few, sample={"max_tokens": 8, "num_prompts": 4})


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tree, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names["CONFIG"] = tree
    assert "Did you mean train.learning_rate?" in capsys.readouterr().out
    store = tmp_path / "artifacts"
    assert sorted(path.name for path in store.iterdir() if not path.name.startswith(".")) == [
        "completions",
        "judge-answers",
        "policy",
        "ref-logps",
        "rows",
        "verdicts",
    ]
    # The command line finds what the notebook made.
    again = run(tree, store, "train")
    assert (again["reused"], Path(again["artifact"])) == (True, store / "policy" / names["dpo"].path.name)
    assert list(names["kto"].metrics.index) == [0, 1, 2, 3]
    assert names["kto"].metrics["loss"].notna().sum() == 3
    axes = names["dpo"].picture(names["kto"]).figure.axes
    assert [chart.get_title(loc="left") for chart in axes[:2]] == ["held-out accuracy", "held-out margin"]
    assert "held-out metric" in repr(names["dpo"])
    assert set(names["rows"]["role"]) >= {"chosen", "rejected"}
    assert 0 <= names["judged"].judge().win_rate["rate"] <= 1
    heldout = session_metrics(names["session"])
    assert heldout["loss"] == pytest.approx(names["dpo"].counts["final"]["loss"], rel=1e-6)


def session_metrics(session: Session) -> Any:
    return session.evaluate()["heldout"]


def test_dotted_keys_and_blocks_are_the_same_configuration(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {path: x.jsonl}\nloss: {name: ipo, beta: 0.3}\ntrain: {seed: 3}\n")
    expected = load_config([file], [], None)
    keys = {"data.path": "x.jsonl", "loss": {"name": "ipo", "beta": 0.3}, "train.seed": 3}
    blocks = {"data": {"path": "x.jsonl"}, "loss": {"name": "ipo", "beta": 0.3}, "train": {"seed": 3}}
    for given in (keys, blocks, file, str(file)):
        assert Session(given, store=tmp_path).config == expected
    changed = Session(file, store=tmp_path).changed({"train.seed": 4}, loss="kto").config
    assert changed == load_config([file], ["train.seed=4"], "kto")


def test_without_a_configuration_it_is_the_quickstart(tmp_path) -> None:
    assert Session(store=tmp_path).config == load_config([], [], None)
    assert Session(loss="kto", store=tmp_path).config == load_config([], [], "kto")


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'beta'"):
        Session({"data.path": "x", "loss.betta": 1}, store=tmp_path)


def test_the_names_of_the_interface_are_few_and_there() -> None:
    assert all(getattr(pipeline, name).__doc__ for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        _ = pipeline.Sesion
