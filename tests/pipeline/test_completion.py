"""What the shell completes, and how people type values."""

import sys

import pytest

from pipeline import completion
from pipeline.config import RunConfig, load_config
from stages.losses import LOSSES


def test_the_losses_are_those_of_the_list():
    assert completion.losses("") == sorted(LOSSES)
    assert completion.losses("dpo") == ["dpo", "dpo_norm", "dpop"]


def test_every_key_is_offered_and_no_other():
    offered = {line.rstrip("=") for line in completion.assignments("")}
    blocks = RunConfig().model_dump()
    del blocks["loss"]
    known = {f"{block}.{key}" for block, keys in blocks.items() for key in keys}
    fields = {f"loss.{field}" for loss in LOSSES.values() for field in loss.model_fields}
    assert offered == known | fields | {"loss"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train.learning", ["train.learning_rate="]),
        ("compute.dtype=", ["compute.dtype=auto", "compute.dtype=float32", "compute.dtype=bfloat16"]),
        ("train.save_best=t", ["train.save_best=true"]),
        ("loss=kt", ["loss=kto"]),
        ("train.learning_rate=1", []),
        ("train.nothing=", []),
    ],
)
def test_keys_and_the_values_that_have_names(typed, offered):
    assert completion.assignments(typed) == offered


def test_configuration_files_and_folders_on_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("mine.yaml", "more.yml", "data.jsonl", "configs/kto.yaml"):
        (tmp_path / name).touch()
    assert completion.config_files("") == ["configs/", "mine.yaml", "more.yml"]
    assert completion.config_files("configs/") == ["configs/kto.yaml"]


def test_the_shell_gets_them(align, monkeypatch):
    """As zsh asks: the whole line in an environment variable."""
    monkeypatch.setenv("_ALIGN_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "align train --loss simp")
    _, out, _ = align()
    assert "simper" in out
    assert "simpo" in out
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "align train --set train.on_nonfinite=")
    assert "train.on_nonfinite=skip" in align()[1]


@pytest.mark.parametrize("value", ["true", "True", "TRUE", "yes", "Yes", "on", "1"])
@pytest.mark.parametrize("key", ["train.save_best", "track.tensorboard"])
def test_a_switch_is_on_as_people_type_it(key, value):
    block, name = key.split(".")
    assert load_config([], [f"{key}={value}"], None).model_dump()[block][name] is True


@pytest.mark.parametrize("value", ["false", "False", "no", "off", "0"])
def test_a_switch_is_off_as_people_type_it(value):
    assert load_config([], [f"prepare.append_eos={value}"], None).prepare.append_eos is False
    assert load_config([], [f"loss.udm={value}"], "bco").loss.model_dump()["udm"] is False


def test_quiet_prints_errors_alone(align, preferences, tiny_model, tmp_path):
    given = ("--set", f"data.path={preferences}", "--set", f"policy.model={tiny_model}")
    code, out, err = align("prepare", *given, "--quiet")
    assert (code, out, err) == (0, "", "")
    code, out, err = align("prepare", *given, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert '"reused": true' in out
    code, out, err = align("prepare", "--quiet", "--set", "data.path=missing.jsonl")
    assert (code, out) == (3, "")
    assert err.startswith("align: ")
    assert len(err.splitlines()) == 1
    assert sys.stdout.writable()
