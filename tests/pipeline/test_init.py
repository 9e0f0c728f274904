"""`align init`: the file loads, means the rows that `align prepare` makes by itself, and is not replaced unasked."""

import json
from pathlib import Path

import pytest

from pipeline.config import RunConfig, build_config, load_config
from pipeline.session import Session
from stages.prepare.stage import rows_identity


@pytest.fixture
def started(align, tiny_model, preferences, tmp_path):
    """Runs `align init` and returns its JSON and the configuration it wrote."""

    def run(*arguments, model: Path = tiny_model, data: Path = preferences) -> tuple[dict, RunConfig]:
        path = tmp_path / "run.yaml"
        code, out, err = align("init", "--model", model, "--data", data, "--json", *arguments)
        assert code == 0, err
        return json.loads(out), load_config([path], [], None)

    return run


def identity(config: RunConfig, store: Path) -> dict:
    data, settings, template, _, filter_ = Session(config, store).inputs.rows_source
    return rows_identity(data, settings, template, filter_)


def test_the_file_means_what_would_be_detected(started, tiny_model, preferences, tmp_path):
    found, config = started()
    assert (found["format"], found["template"], found["loss"]) == ("preference", "chat", "dpo")
    assert found["rows_read"] == 24
    assert (config.data.format, config.prepare.template) == ("preference", "chat")
    detected = build_config(
        {
            "data": {"path": str(preferences)},
            "policy": {"model": str(tiny_model)},
            "prepare": {"max_length": config.prepare.max_length},
        }
    )
    assert identity(config, tmp_path / "a") == identity(detected, tmp_path / "b")


def test_the_limit_is_not_beyond_the_positions_of_the_model(started):
    _, config = started()
    assert config.prepare.max_length == 256


def test_every_loss_keeps_its_own_learning_rate(started, tmp_path):
    _, config = started()
    assert config.train.learning_rate is None
    assert config.train.batch_size is None
    assert "for dpo 1e-6 and 64" in (tmp_path / "run.yaml").read_text()


def test_a_csv_of_thumbs_gets_kto(started, tmp_path):
    data = tmp_path / "thumbs.csv"
    data.write_text("prompt,completion,label\nSky?,Blue.,true\nSky?,Green.,false\n2+2?,4,true\n")
    found, config = started(data=data)
    assert (found["loss"], found["format"]) == ("kto", "unpaired")
    assert config.loss.model_dump()["name"] == "kto"


def test_columns_of_other_names_get_a_map(started, tmp_path):
    data = tmp_path / "thumbs.csv"
    data.write_text("prompt,answer,thumb\nSky?,Blue.,up\nSky?,Green.,down\n2+2?,4,up\n")
    found, config = started(data=data)
    assert (found["loss"], found["format"]) == ("kto", "unpaired")
    assert (
        found["columns"]
        == config.data.columns
        == {"prompt": "prompt", "completion": "answer", "label": "thumb"}
    )
    rows = Session(config, tmp_path / "store").run("prepare").as_json()["rows_by_role"]
    assert (rows["desirable"], rows["undesirable"]) == (2, 1)


def test_a_model_without_a_chat_template_gets_plain(started, tiny_base_model):
    found, config = started(model=tiny_base_model)
    assert (found["template"], config.prepare.template) == ("plain", "plain")


def test_a_file_is_replaced_only_when_asked(started, align, tiny_model, preferences, tmp_path):
    (tmp_path / "run.yaml").write_text("mine")
    code, _, err = align("init", "--model", tiny_model, "--data", preferences)
    assert code == 2
    assert err == "align: run.yaml exists. Name another file with -o FILE, or replace it with --force.\n"
    assert (tmp_path / "run.yaml").read_text() == "mine"
    started("--force")


def test_missing_data_writes_nothing(align, tiny_model, tmp_path):
    code, _, err = align("init", "--model", tiny_model, "--data", "none.jsonl")
    assert code == 3
    assert "none.jsonl" in err
    assert list(tmp_path.iterdir()) == []


def test_a_person_sees_three_examples_and_where_training_ends(align, tiny_model, preferences, tmp_path):
    code, out, err = align("init", "--model", tiny_model, "--data", preferences, "-o", "new/it is.yaml")
    assert code == 0, err
    for number in (1, 2, 3):
        assert f"preferences.jsonl:{number} chosen" in out
    assert "preferences.jsonl:4" not in out
    assert out.count("◀ end") == 7  # the legend, and each completion
    assert "align run -c 'new/it is.yaml'" in out
    load_config([tmp_path / "new" / "it is.yaml"], [], None)
