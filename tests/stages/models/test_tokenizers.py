"""Tokenizers of model folders: the one of tokenizer.json, whatever else is installed."""

import json
import shutil

import pytest

from cache.errors import DataError
from stages.models.loading import ModelSource, load_tokenizer


@pytest.fixture
def mistral(tmp_path, chat_tokenizer):
    """A folder as Mistral publishes it: tokenizer.json and tekken.json side by side."""
    chat_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (tmp_path / "tekken.json").write_text("{}")
    return tmp_path


def test_beside_a_tekken_file_the_tokenizer_of_transformers_is_opened(mistral, chat_tokenizer):
    found = load_tokenizer(ModelSource("mistral", mistral))
    assert found.is_fast
    assert found.chat_template == chat_tokenizer.chat_template
    assert found("Hi there")["input_ids"] == chat_tokenizer("Hi there")["input_ids"]
    assert (found.eos_token, found.pad_token) == (chat_tokenizer.eos_token, chat_tokenizer.pad_token)


def test_a_folder_with_a_tekken_file_alone_is_one_line(mistral, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "tekken.json"):
        shutil.copy(mistral / name, alone)
    with pytest.raises(DataError, match=r"has Mistral's tekken\.json and no tokenizer\.json"):
        load_tokenizer(ModelSource("mistral", alone))
