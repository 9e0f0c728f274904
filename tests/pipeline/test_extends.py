"""A configuration file that extends another: what it inherits, what it overrides, and what is refused."""

from pathlib import Path

import pytest

from cache.errors import UsageError
from pipeline.config import RunConfig, load_config
from pipeline.config_sources import CONFIGS
from stages.losses import LOSSES, parse_loss

RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem in LOSSES)


def write(folder: Path, **texts: str) -> list[Path]:
    """A file for each name, in this order."""
    paths = [folder / f"{name}.yaml" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return paths


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_config([path], [], None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_extends_is_the_same_as_two_files_in_a_row(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\nextends: ultrafeedback.yaml\n") == 1
    (alone,) = write(tmp_path, alone=text.replace("extends: ultrafeedback.yaml\n", ""))
    assert load_config([path], [], None) == load_config([CONFIGS / "ultrafeedback.yaml", alone], [], None)


def test_a_file_wins_over_the_one_it_extends_key_by_key(tmp_path):
    *_, top = write(
        tmp_path,
        base="train: {seed: 1, num_epochs: 2, max_steps: 7}\n",
        middle="extends: base.yaml\ntrain: {seed: 2, num_epochs: 3}\n",
        top="extends: middle.yaml\ntrain: {seed: 3}\n",
    )
    config = load_config([top], [], None)
    assert (config.train.seed, config.train.num_epochs, config.train.max_steps) == (3, 3, 7)
    assert load_config([top], ["train.seed=4"], None).train.seed == 4


def test_a_named_loss_replaces_the_block_of_the_file_it_extends(tmp_path):
    _, named, field = write(
        tmp_path,
        ipo="loss: {name: ipo, beta: 0.3, normalize: sum}\n",
        named="extends: ipo.yaml\nloss: {name: kto}\n",
        field="extends: ipo.yaml\nloss: {beta: 0.2}\n",
    )
    assert load_config([named], [], None).loss == parse_loss({"name": "kto"})
    wanted = parse_loss({"name": "ipo", "beta": 0.2, "normalize": "sum"})
    assert load_config([field], [], None).loss == wanted


def test_the_name_is_relative_to_the_file_and_not_to_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "shared", base="train: {seed: 5}\n")
    (run,) = write(tmp_path / "runs", run="extends: ../shared/base.yaml\n")
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, base="train: {seed: 6}\n")
    monkeypatch.chdir(elsewhere)
    assert load_config([run], [], None).train.seed == 5


def test_a_later_file_brings_what_it_extends(tmp_path):
    _, first, second = write(
        tmp_path,
        base="train: {seed: 1, num_epochs: 2}\n",
        first="train: {seed: 3, num_epochs: 4, max_steps: 5}\n",
        second="extends: base.yaml\ntrain: {num_epochs: 6}\n",
    )
    config = load_config([first, second], [], None)
    assert (config.train.seed, config.train.num_epochs, config.train.max_steps) == (1, 6, 5)


def test_the_saved_configuration_needs_no_other_file(tmp_path):
    config = load_config([CONFIGS / "lora.yaml"], [], None)
    (saved,) = write(tmp_path, saved=config.to_yaml())
    assert "extends" not in config.to_yaml()
    assert load_config([saved], [], None) == config
    assert isinstance(config, RunConfig)


def test_a_circle_is_refused_with_the_file_that_closes_it(tmp_path):
    first, second, self_ = write(
        tmp_path, first="extends: second.yaml\n", second="extends: first.yaml\n", self="extends: self.yaml\n"
    )
    assert refusal(first).startswith(f"{second}: extends: first.yaml")
    assert refusal(self_).startswith(f"{self_}: extends: self.yaml")


def test_a_missing_file_is_refused_with_the_place_it_was_looked_for(tmp_path):
    (path,) = write(tmp_path, run="extends: nope.yaml\n")
    assert refusal(path) == (
        f"{path}: extends: no such file {tmp_path / 'nope.yaml'}. The name is relative to {tmp_path}."
    )


@pytest.mark.parametrize("value", ["", "[base.yaml]", "7", "{data: base.yaml}"])
def test_anything_but_one_name_is_refused(tmp_path, value):
    (path,) = write(tmp_path, run=f"extends: {value}\n")
    assert refusal(path).startswith(f"{path}: extends: expected the name of one file")


def test_a_mistake_in_the_extended_file_names_that_file(tmp_path):
    _, path = write(tmp_path, base="train: [\n", run="extends: base.yaml\n")
    assert refusal(path).startswith(f"{tmp_path / 'base.yaml'} is not valid YAML")
