"""The trainings of a sweep: which combinations, as which configurations, typed how."""

import math
import shlex

import pytest
import yaml

from cache.errors import UsageError
from pipeline.config import build_config, load_config
from pipeline.config_sources import CONFIGS
from pipeline.sweep.members import members_of
from stages.settings.sweep import SweepSettings


def members(keys: dict, loss: str = "dpo", **sweep):
    return members_of(build_config({"loss": {"name": loss}, "sweep": {"keys": keys, **sweep}}))


def test_a_grid_is_every_combination_with_every_seed():
    found = members({"train.learning_rate": [1e-6, 2e-6], "loss.beta": [0.1, 0.2]}, seeds=[3, 4])
    assert [(one.config.train.learning_rate, one.config.loss.beta, one.config.train.seed) for one in found] == [
        (rate, beta, seed) for rate in (1e-6, 2e-6) for beta in (0.1, 0.2) for seed in (3, 4)
    ]  # fmt: skip
    assert [one.number for one in found] == list(range(1, 9))
    assert len({one.setting for one in found}) == 4
    assert found[0].name == "learning_rate 1e-06, beta 0.1, seed 3"


def test_a_loss_is_the_whole_block_wherever_it_stands():
    found = members({"loss.beta": [0.3], "loss": ["simpo", {"name": "kto", "desirable_weight": 1.5}, "dpo"]})
    assert [one.config.loss.model_dump()["name"] for one in found] == ["simpo", "kto", "dpo"]
    assert [one.config.loss.beta for one in found] == [0.3] * 3
    assert found[1].config.loss.desirable_weight == 1.5
    assert "loss kto desirable_weight 1.5" in found[1].name


def test_a_member_is_no_sweep_itself():
    assert members({"adapter.name": ["none", "lora"]})[1].config.sweep == SweepSettings()


@pytest.mark.slow
def test_a_random_search_draws_within_the_bounds_and_always_the_same():
    keys = {
        "train.learning_rate": {"min": 1e-7, "max": 1e-4, "log": True},
        "loss.beta": {"min": 0.1, "max": 0.5},
        "train.batch_size": {"min": 16, "max": 64},
        "loss": ["dpo", "ipo"],
    }
    drawn = [one.values for one in members(keys, method="random", num_samples=200)]
    assert drawn == [one.values for one in members(keys, method="random", num_samples=200)]
    assert drawn != [one.values for one in members(keys, method="random", num_samples=200, seed=1)]
    rates = [one["train.learning_rate"] for one in drawn]
    assert all(1e-7 <= rate <= 1e-4 for rate in rates)
    # Uniform in the logarithm: half of the draws are below the geometric mean. 5 standard deviations are 35.
    assert abs(sum(rate < math.sqrt(1e-7 * 1e-4) for rate in rates) - 100) < 35
    assert all(0.1 <= one["loss.beta"] <= 0.5 for one in drawn)
    assert {type(one["train.batch_size"]) for one in drawn} == {int}
    assert {one["loss"] for one in drawn} == {"dpo", "ipo"}


@pytest.mark.slow
def test_the_printed_command_is_the_configuration_that_is_trained(tmp_path):
    path = tmp_path / "sweep.yaml"
    sweep = {
        "keys": {
            "loss": ["dpo", {"name": "simpo", "gamma_beta_ratio": 0.3}],
            "train.learning_rate": [1e-6, 0.00025],
            "prepare.template": ["auto", "it's a file.jinja"],
            "adapter.target_modules": [["q_proj", "v_proj"], "all-linear"],
            "train.max_steps": [None, 5],
            "train.save_best": [False],
        },
        "seeds": [1],
    }
    path.write_text(yaml.safe_dump({"loss": {"name": "dpo", "beta": 0.7}, "sweep": sweep}))
    base = load_config([path], ["train.batch_size=8"], None)
    found = members_of(base)
    assert len(found) == 32
    for member in found:
        program, command, *arguments = shlex.split(
            member.command(shlex.join(["-c", str(path), "--set", "train.batch_size=8"]))
        )
        assert (program, command) == ("align", "train")
        values = arguments[1::2]
        loaded = load_config([path], values[1:], None)
        assert loaded.model_copy(update={"sweep": SweepSettings()}) == member.config


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "names no keys"),
        ({"keys": {"loss.bta": [1]}}, "loss.bta.*Did you mean 'beta'"),
        ({"keys": {"train.learning_rate": {"min": 1e-6, "max": 1e-5}}}, "a range"),
        ({"keys": {"train.learning_rate": {"min": 1e-5, "max": 1e-6}}, "method": "random"}, "min < max"),
        ({"keys": {"train.learning_rate": {"min": 0, "max": 1, "log": True}}}, "min > 0"),
        ({"keys": {"train.learning_rate": []}}, "at least 1"),
        ({"keys": {"train.learning_rate": [-1]}}, "greater than 0"),
        ({"keys": {"train.seed": [1]}, "seeds": [1]}, "both name train.seed"),
        ({"keys": {"sweep.seed": [1]}}, "cannot vary"),
        ({"keys": {"loss": ["dop"]}}, "dop"),
    ],
)
def test_a_wrong_block_is_refused_before_anything_is_trained(block, message):
    with pytest.raises(UsageError, match=message):
        members_of(build_config({"sweep": block}))


SHIPPED = sorted(CONFIGS.glob("sweep-*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_is_what_its_first_lines_say(path):
    config = load_config([path], [], None)
    found = members_of(config)
    text = path.read_text(encoding="utf-8")
    assert f" {len(found)} trainings" in text or path.stem == "sweep-quickstart"
    assert config.data.path == "quickstart"
    assert config.prepare.heldout_fraction > 0
    assert len(config.sweep.seeds) >= 2
    for member in found:
        assert 16 <= (member.config.train.batch_size or member.config.loss.batch_size) <= 64
    assert len({member.data_key for member in found}) == 1


def test_the_shipped_sweeps_are_those_of_the_losses():
    assert {path.stem for path in SHIPPED} >= {"sweep-simpo", "sweep-orpo", "sweep-kto", "sweep-dpo_norm"}
