"""The quickstart's world: distinct prompts, two balanced tones, a clean template, a deterministic build."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import jinja2
import pytest

from cache.errors import CorruptError
from pipeline import quickstart
from pipeline.quickstart import Recipe, build, make_tokenizer
from pipeline.quickstart_world import is_preferred, preference_pairs

SHORT_RECIPE = Recipe(num_epochs=1, batch_size=128)


@pytest.fixture(scope="module")
def pairs():
    return preference_pairs(seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(Recipe())


def reply(pair, role):
    return pair[role][0]["content"]


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_prompts_are_many_and_distinct(pairs):
    prompts = {pair["prompt"][0]["content"] for pair in pairs}
    assert len(prompts) == len(pairs) >= 350


def test_tone_separates_every_chosen_from_every_rejected(pairs):
    assert all(is_preferred(reply(pair, "chosen")) for pair in pairs)
    assert not any(is_preferred(reply(pair, "rejected")) for pair in pairs)


def test_a_plain_or_mixed_answer_is_not_preferred():
    assert not is_preferred("A bear eats berries.")
    assert not is_preferred("Certainly! A bear eats berries. Stop asking me.")


def test_lengths_do_not_give_the_tone_away(pairs, tokenizer):
    for length in (len, lambda text: len(tokenizer(text)["input_ids"])):
        chosen, rejected = (
            mean(length(reply(pair, role)) for pair in pairs) for role in ("chosen", "rejected")
        )
        assert chosen == pytest.approx(rejected, rel=0.15)


def test_template_closes_with_one_eos_and_keeps_the_prompt_as_prefix(pairs, tokenizer):
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        for role in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[role], return_dict=False)
            assert whole[: len(prompt)] == prompt
            assert whole.count(tokenizer.eos_token_id) == 1
            assert whole[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(whole[len(prompt) : -1]) == reply(pair, role)


def test_template_knows_system_and_refuses_other_roles(tokenizer):
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(system, tokenize=False) == "<|system|>Be kind.\n<|user|>Hi\n"
    with pytest.raises(jinja2.TemplateError, match="Unknown role 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "Hi"}], tokenize=False)


def test_text_outside_the_world_survives_the_tokenizer(tokenizer):
    text = "Crème brûlée, 東京 and 🦊!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_second_build_is_reused_and_a_changed_file_is_refused(tmp_path):
    said = []
    built = build(tmp_path, said.append, SHORT_RECIPE)
    lines = built.preferences.read_text().splitlines()
    assert json.loads(lines[0]).keys() == {"prompt", "chosen", "rejected"}
    assert len(said) == 2

    assert build(tmp_path, said.append, SHORT_RECIPE) == built
    assert len(said) == 2

    (built.model / "config.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"config\.json is missing or was changed"):
        build(tmp_path, said.append, SHORT_RECIPE)


@pytest.mark.slow
def test_building_leaves_torch_as_it_was_and_ignores_its_state(tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    build(tmp_path / "here", lambda _: None, SHORT_RECIPE)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)

    # Another process has another hash seed, so an order that hangs on a set or a hash would show.
    script = (
        "import sys, pathlib; from pipeline.quickstart import Recipe, build; "
        "build(pathlib.Path(sys.argv[1]), print, Recipe(num_epochs=1, batch_size=128))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(quickstart.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "there")], check=True, cwd=root, env=environment
    )
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
