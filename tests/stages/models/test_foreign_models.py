"""Models of others: what their files cannot do is one line before anything is scored or trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cache.errors import AlignError, DataError
from stages.models.fit import check_can_be_saved, num_positions
from stages.models.identity import reference_identity
from stages.models.loading import ModelSource, load_model, load_tokenizer, open_config, resolve_model
from stages.runtime.compute import Compute
from tests.pipeline.small_run import session, settings

COMPUTE = Compute(torch.device("cpu"), torch.float32, 2048)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


def one_line(attempt: Callable[[], object], match: str) -> None:
    with pytest.raises(AlignError, match=match) as error:
        attempt()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "\x00", '{"model_type": "no_such_model"}', "{}", '{"model_type": 3}']
)
def test_a_config_of_a_reference_that_is_none_is_one_line(text, model, tiny_model, preferences, tmp_path):
    tree = settings(tiny_model, preferences, reference={"model": str(model)})
    session(tree, tmp_path / "store").run("prepare")
    (model / "config.json").write_text(text)
    one_line(lambda: session(tree, tmp_path / "store").run("cache-ref"), r"config\.json")
    assert not (tmp_path / "store" / "ref-logps").exists()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinity_in_a_config_is_part_of_the_identity(value, model):
    """As Mamba-2 has in time_step_limit: [0.0, Infinity]."""
    source = ModelSource("m", model)
    before = reference_identity(source, COMPUTE)
    edit(model / "config.json", time_step_limit=[0.0, value])
    after = reference_identity(source, COMPUTE)
    assert before != after == reference_identity(source, COMPUTE)
    load_model(source, COMPUTE)


@pytest.mark.parametrize("values", [{"hidden_size": 48}, {"hidden_size": "x"}, {"rope_parameters": 3}])
def test_a_config_of_another_model_is_one_line(values, model):
    edit(model / "config.json", **values)
    one_line(lambda: load_model(ModelSource("m", model), COMPUTE), "model")


def test_weights_that_are_missing_are_not_drawn_at_random(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    match = r"lacks weights that the model has: model\.layers\.1\.mlp\.up_proj\.weight \(1\)"
    one_line(lambda: load_model(ModelSource("m", model), COMPUTE), match)


def test_a_folder_without_a_tokenizer_gets_none_from_the_air(tmp_path):
    """transformers makes one of a single token for it."""
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(ModelSource("m", tmp_path))


UNSAVABLE = {"do_sample": False, "temperature": 0.3}


def saves(model: Path) -> bool:
    """Whether transformers writes the model as it was read; from some version on it only warns of UNSAVABLE."""
    loaded = load_model(ModelSource("m", model), COMPUTE)
    try:
        loaded.save_pretrained(model.parent / "saved")
    except ValueError:
        return False
    return True


def test_what_loads_but_cannot_be_saved_is_found_before_training(model):
    source = ModelSource("m", model)
    check_can_be_saved(source)
    edit(model / "generation_config.json", **UNSAVABLE)
    if saves(model):
        check_can_be_saved(source)
    else:
        one_line(
            lambda: check_can_be_saved(source),
            r"generation_config\.json cannot be saved.*temperature.*Fix the file",
        )
    (model / "generation_config.json").write_text("{")
    one_line(lambda: check_can_be_saved(source), r"generation_config\.json")


def test_training_does_not_begin_with_a_model_that_cannot_be_saved(model, preferences, tmp_path):
    edit(model / "generation_config.json", **UNSAVABLE)
    if saves(model):
        pytest.skip("this version of transformers saves what it has loaded")
    tree = settings(model, preferences, loss={"name": "simpo"})
    session(tree, tmp_path / "store").run("prepare")
    one_line(
        lambda: session(tree, tmp_path / "store").run("train"), r"generation_config\.json cannot be saved"
    )
    assert not (tmp_path / "store" / "policy").exists()


@pytest.mark.slow
def test_rows_longer_than_n_positions_are_refused(chat_tokenizer, preferences, tmp_path):
    """GPT-2's name for it; the embedding of positions ended in an IndexError."""
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    assert num_positions(ModelSource("m", folder)) == 16
    tree = settings(folder, preferences)
    session(tree, tmp_path / "store").run("prepare")
    match = r"longest row has \d+ tokens, and gpt2 has 16 positions.*prepare\.max_length=16"
    one_line(lambda: session(tree, tmp_path / "store").run("cache-ref"), match)
    tree["loss"] = {"name": "simpo"}
    one_line(lambda: session(tree, tmp_path / "store").run("train"), match)


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_embedding_is_refused(model, preferences, tmp_path):
    """Tokens that were added to a tokenizer, without a larger embedding, ended in an IndexError."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([" kind"])
    tokenizer.save_pretrained(model)
    tree = settings(model, preferences)
    session(tree, tmp_path / "store").run("prepare")
    match = r"Row \w+ \(preferences\.jsonl:\d+\) has token id 320, and the embedding of .* ends at 319"
    one_line(lambda: session(tree, tmp_path / "store").run("cache-ref"), match)
    tree["loss"] = {"name": "simpo"}
    one_line(lambda: session(tree, tmp_path / "store").run("train"), match)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(model, tmp_path, monkeypatch) -> Path:
    """A model whose classes are in a file beside its weights."""
    (model / "mine.py").write_text(CODE)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edit(model / "config.json", model_type="mine", auto_map=auto_map)
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    return model


def test_code_of_a_model_is_neither_run_nor_asked_about(with_code, preferences, tmp_path):
    (with_code / "mine.py").write_text("raise SystemExit('it ran')")
    match = r"brings Python code of its own.*compute\.trust_remote_code=true"
    source = resolve_model(str(with_code), None)
    load_tokenizer(source)  # asks nothing, and needs no code
    for attempt in (open_config, check_can_be_saved, lambda one: load_model(one, COMPUTE)):
        one_line(lambda attempt=attempt: attempt(source), match)
    tree = settings(with_code, preferences)
    one_line(lambda: session(tree, tmp_path / "store").run("prepare"), match)


@pytest.mark.slow
def test_code_of_a_model_runs_where_it_is_allowed_and_is_part_of_the_identity(
    with_code, tiny_model, preferences, tmp_path
):
    allowed = settings(with_code, preferences, compute={"trust_remote_code": True})
    session(allowed, tmp_path / "store").run("prepare")
    first = session(allowed, tmp_path / "store").run("cache-ref")
    assert first["rows_scored"] > 0
    (with_code / "mine.py").write_text(CODE + "# another version\n")
    assert session(allowed, tmp_path / "store").run("cache-ref")["fingerprint"] != first["fingerprint"]
    source = resolve_model(str(with_code), None, runs_code=True)
    assert type(load_model(source, COMPUTE)).__name__ == "MineForCausalLM"


def test_code_in_another_repository_is_refused(with_code):
    edit(with_code / "config.json", auto_map={"AutoConfig": "someone/else--mine.MineConfig"})
    source = resolve_model(str(with_code), None, runs_code=True)
    with pytest.raises(DataError, match="auto_map names code in another repository"):
        reference_identity(source, COMPUTE)
