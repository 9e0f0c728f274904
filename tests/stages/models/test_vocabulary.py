"""Two models meet only over ids that are the same tokens to both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cache.errors import StaleError, UsageError
from stages.models.loading import ModelSource
from stages.models.vocabulary import TokensInUse
from tests.conftest import save_tiny_llama
from tests.pipeline.small_run import session, settings

# Ids of the tiny tokenizer: single bytes, which every text here has.
SWAPPED = ("e", "o")


def swap_tokens(folder: Path) -> None:
    """Two tokens have each other's ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    one, two = SWAPPED
    ids[one], ids[two] = ids[two], ids[one]
    path.write_text(json.dumps(content))


def add_token(folder: Path) -> None:
    """One more token, of which no row has the id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|unused|>"])
    tokenizer.save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.fixture
def changed(tiny_model, tmp_path) -> Callable[..., Path]:
    """A copy of the model with a change; the tokenizer alone is changed."""

    def make(change: Callable[[Path], None]) -> Path:
        shutil.copytree(tiny_model, tmp_path / change.__name__)
        change(tmp_path / change.__name__)
        return tmp_path / change.__name__

    return make


@pytest.fixture
def rows(tiny_model, preferences, tmp_path) -> Callable[..., dict]:
    """A configuration of rows that are prepared, in the store `tmp_path / "store"`."""

    def prepared(**changes: dict) -> dict:
        tree = settings(tiny_model, preferences, **changes)
        session(tree, tmp_path / "store").run("prepare")
        return tree

    return prepared


def test_a_reference_with_other_tokens_is_refused_before_it_scores(changed, rows, tmp_path):
    tree = rows(reference={"model": str(changed(swap_tokens))})
    with pytest.raises(UsageError) as refused:
        session(tree, tmp_path / "store").run("cache-ref")
    ids = AutoTokenizer.from_pretrained(tree["policy"]["model"]).convert_tokens_to_ids(list(SWAPPED))
    for number, here, there in (*zip(ids, SWAPPED, SWAPPED[::-1], strict=True),):
        assert f"{number} is {here!r} and {there!r}" in str(refused.value)
    assert "2 of " in str(refused.value)
    assert "reference.model=NAME" in str(refused.value)
    assert not (tmp_path / "store" / "ref-logps").exists()


def test_a_reference_of_fewer_tokens_is_refused(base_tokenizer, rows, tmp_path):
    """The other way round, which ended in an IndexError of the embedding."""
    from tests.tiny_llama import random_llama

    small = tmp_path / "small"
    random_llama(3, vocab_size=40).save_pretrained(small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        base_tokenizer.save_pretrained(tmp_path / "tokenizer")
        shutil.copy(tmp_path / "tokenizer" / name, small)
    tree = rows(reference={"model": str(small)})
    with pytest.raises(UsageError, match=r"has another vocabulary than"):
        session(tree, tmp_path / "store").run("cache-ref")
    no_tokenizer(small)
    said: list[str] = []
    with pytest.raises(UsageError, match=r"has token id \d+, and the embedding of .*small ends at 39"):
        session(tree, tmp_path / "store", said).run("cache-ref")
    assert any("has no tokenizer, so its vocabulary is not compared" in line for line in said)


@pytest.mark.slow
def test_padding_and_further_tokens_are_allowed(chat_tokenizer, changed, rows, tmp_path):
    from tests.tiny_llama import random_llama

    padded = tmp_path / "padded"
    random_llama(3, vocab_size=384).save_pretrained(padded)
    chat_tokenizer.save_pretrained(padded)
    for reference in (padded, changed(add_token), save_tiny_llama(tmp_path / "same", chat_tokenizer, seed=4)):
        tree = rows(reference={"model": str(reference)})
        assert session(tree, tmp_path / "store").run("cache-ref")["rows_scored"] > 0


@pytest.mark.slow
def test_training_compares_the_tokens_of_the_reference_too(changed, tiny_model, preferences, rows, tmp_path):
    """Its log-probs may have been cached for rows of another policy, with the same ids; and then it may be gone."""
    other = changed(swap_tokens)
    reference = tmp_path / "reference"
    shutil.copytree(other, reference)
    model = {"model": str(reference)}
    cached = settings(other, preferences, reference=model)
    session(cached, tmp_path / "store").run("prepare")
    session(cached, tmp_path / "store").run("cache-ref")
    tree = rows(reference=model)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"The reference .*has another vocabulary than"):
            session(tree, tmp_path / "store").run("train")
        shutil.rmtree(reference, ignore_errors=True)
    assert session(cached, tmp_path / "store").dry_run("train").stages["train"].would == "train"


@pytest.mark.parametrize(("command", "block"), [("eval", "eval"), ("sample", "sample")])
def test_a_model_with_other_tokens_is_neither_evaluated_nor_sampled(command, block, changed, rows, tmp_path):
    tree = rows(loss={"name": "simpo"}, **{block: {"model": str(changed(swap_tokens))}})
    with pytest.raises(UsageError, match=r"The model .*has another vocabulary than .*policy\.model="):
        session(tree, tmp_path / "store").run(command)


def test_the_base_of_an_adapter_must_have_the_tokens_too(changed, tiny_model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    used = TokensInUse(AutoTokenizer.from_pretrained(tiny_model), lambda: range(300))
    for base, allowed in ((tiny_model, True), (changed(swap_tokens), False)):
        config = {"base_model_name_or_path": str(base)}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        source = ModelSource("adapter", adapter)
        if allowed:
            used.check(source, "The model", "", pytest.fail)
        else:
            with pytest.raises(UsageError, match=r"The model .*swap_tokens has another vocabulary"):
                used.check(source, "The model", "", pytest.fail)


def test_the_message_names_what_train_has_to_do_first(rows, tiny_model, tmp_path):
    """Without cached log-probs the advice is cache-ref, as before; that is where the vocabularies are compared."""
    tree = rows(reference={"model": str(tiny_model)})
    with pytest.raises(StaleError, match="cache-ref"):
        session(tree, tmp_path / "store").run("train")
