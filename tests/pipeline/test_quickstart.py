"""The quickstart's world: distinct prompts, two balanced tones, a clean template, a deterministic build."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import jinja2
import pytest

from cache.errors import CorruptError
from cache.ownership import OWNER, host
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_second_build_is_reused_and_a_changed_file_is_refused(built_before, tmp_path):
    root, said = built_before
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    again = []
    built = build(tmp_path, again.append, SHORT_RECIPE)
    assert (len(said), again) == (2, [])
    lines = built.preferences.read_text().splitlines()
    assert json.loads(lines[0]).keys() == {"prompt", "chosen", "rejected"}

    (built.model / "config.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"config\.json is missing or was changed"):
        build(tmp_path, again.append, SHORT_RECIPE)


@pytest.fixture(scope="module")
def built_before(tmp_path_factory) -> tuple[Path, list[str]]:
    """Where a quickstart was built in this process, and what was said; torch is as it was before."""
    import torch

    root, said = tmp_path_factory.mktemp("here"), []
    final = quickstart.folder_of(root, SHORT_RECIPE)
    never = 1 << 22  # larger than any process id of Linux
    killed = final.with_name(f".tmp-{final.name}.{host()}.{never + 1}.0123abcd")
    killed.mkdir(parents=True)
    (killed / OWNER).touch()
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    build(root, said.append, SHORT_RECIPE)
    assert list(final.parent.iterdir()) == [final]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
    return root, said


@pytest.mark.slow
def test_a_build_ignores_the_state_of_its_process(built_before, tmp_path):
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
    assert digests(tmp_path / "there") == digests(built_before[0])
