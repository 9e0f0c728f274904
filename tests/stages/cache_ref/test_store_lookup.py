"""Which store a reference's name leads to: that of the folder it names today, and damage of the note is one line."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import CorruptError, StaleError
from cache.fingerprint import row_key
from cache.ref_logps import RefLogps
from stages.cache_ref.store_lookup import open_reference, open_start, remember_store, store_of
from stages.models.identity import reference_identity
from stages.models.loading import ModelSource, resolve_model
from stages.models.vocabulary import TokensInUse
from stages.runtime.compute import Compute
from tests.conftest import make_chat_tokenizer
from tests.tiny_llama import random_llama

COMPUTE = Compute(torch.device("cpu"), torch.float32, 2048)
KEY = row_key(np.array([1]), np.array([2]))


def save(folder: Path, seed: int) -> Path:
    random_llama(
        seed, vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[Path]:
    """Three models of one shape, so that their files have the same names and sizes."""
    return [save(tmp_path_factory.mktemp("models") / f"model{seed}", seed) for seed in range(3)]


@pytest.fixture
def models(saved, tmp_path) -> list[Path]:
    """Copies of them that the test may change."""
    for folder in saved:
        shutil.copytree(folder, tmp_path / folder.name)
    return [tmp_path / folder.name for folder in saved]


def cached(name: str | Path, value: float, context) -> None:
    """As after cache-ref: one log-prob of this model is stored."""
    source = resolve_model(str(name), None)
    store = store_of(source, COMPUTE, context)
    store.add([KEY], [np.array([value])])
    remember_store(source, COMPUTE, store, context)


def found(name: str | Path, context) -> float:
    used = TokensInUse(make_chat_tokenizer(), lambda: [1, 2])
    return float(open_reference(str(name), None, used, COMPUTE, context).get(KEY)[0])


def test_a_link_leads_to_the_store_of_the_folder_it_names_today(models, context, tmp_path):
    link = tmp_path / "ref"
    link.symlink_to(models[0])
    cached(link, -1.0, context)
    cached(models[1], -2.0, context)
    assert (found(link, context), found(models[0], context)) == (-1.0, -1.0)
    link.unlink()
    link.symlink_to(models[1])
    assert found(link, context) == -2.0
    link.unlink()
    link.symlink_to(models[2])
    with pytest.raises(StaleError, match=r"No reference log-probs of .*ref in float32.*align cache-ref"):
        found(link, context)


def test_a_relative_name_is_that_of_the_folder_in_the_working_folder(models, context, tmp_path, monkeypatch):
    for number in (0, 1, 2):
        (tmp_path / f"work{number}").mkdir()
        models[number].rename(tmp_path / f"work{number}" / "ref")
    for number, value in ((0, -1.0), (1, -2.0)):
        monkeypatch.chdir(tmp_path / f"work{number}")
        cached("./ref", value, context)
    assert found("ref", context) == -2.0
    monkeypatch.chdir(tmp_path / "work0")
    assert found("./ref", context) == -1.0
    monkeypatch.chdir(tmp_path / "work2")
    with pytest.raises(StaleError, match=r"No reference log-probs of \./ref"):
        found("./ref", context)


def test_files_that_were_swapped_are_noticed_whatever_their_dates(models, context):
    cached(models[0], -1.0, context)
    path = models[0] / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    shutil.copyfile(models[1] / "model.safetensors", path)
    os.utime(path, ns=times)
    with pytest.raises(StaleError, match=r"size or date of model\.safetensors.*align cache-ref"):
        found(models[0], context)


def test_a_file_that_the_loader_would_prefer_now_is_a_change(models, context):
    cached(models[0], -1.0, context)
    (models[0] / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(StaleError, match=r"size or date of model\.safetensors\.index\.json"):
        found(models[0], context)


@pytest.mark.parametrize(
    "gone",
    [["model.safetensors"], ["config.json", "model.safetensors"], ["config.json", "model.safetensors", "."]],
)
def test_weights_that_are_gone_are_not_changed(gone, models, context, said, tmp_path):
    link = tmp_path / "ref"
    link.symlink_to(models[0])
    cached(link, -1.0, context)
    for name in gone:
        shutil.rmtree(models[0]) if name == "." else (models[0] / name).unlink()
    assert found(link, context) == -1.0
    names = ", ".join(name for name in gone if name != ".")
    assert said == [f"The reference {link} is gone ({names}); its stored log-probs are used as they are."]


def test_weights_that_are_partly_gone_and_partly_changed_are_changed(models, context):
    cached(models[0], -1.0, context)
    (models[0] / "model.safetensors").unlink()
    (models[0] / "config.json").write_text("{}")
    with pytest.raises(StaleError, match=r"size or date of config\.json"):
        found(models[0], context)


@pytest.mark.slow
def test_a_damaged_note_is_one_line_with_a_way_out(models, context):
    """Flipped bits could lead to another store, or give the files other dates. (Every byte: tests/cache/test_files.py.)"""
    cached(models[0], -1.0, context)
    [note] = (context.store.root / "ref-logps" / "by-place").glob("*.json")
    content = note.read_bytes()
    for position in range(0, len(content), 7):
        flipped = bytes([content[position] ^ (1 << position % 8)])
        note.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            assert found(models[0], context) == -1.0  # white space between values
        except CorruptError as error:
            assert re.search(r"Delete it and run: align cache-ref", str(error))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    cached(models[0], -1.0, context)
    assert note.read_bytes() == content


def test_the_policys_own_store_is_found_by_content(models, context):
    """Under another name, and after an edit that keeps the size and the dates."""
    cached(models[0], -1.0, context)
    shutil.copytree(models[0], models[0].with_name("copy"))
    source = ModelSource("copy", models[0].with_name("copy"))
    start = reference_identity(source, COMPUTE)
    assert open_start(source, start, COMPUTE, context).get(KEY) == [-1.0]
    source = ModelSource("model0", models[0])
    shutil.copyfile(models[1] / "model.safetensors", models[0] / "model.safetensors")
    with pytest.raises(StaleError, match=r"not of the policy's own starting weights: weights: \w+\.\.\. -> "):
        open_start(source, reference_identity(source, COMPUTE), COMPUTE, context)


def test_a_damaged_manifest_of_a_store_costs_no_row(models, context):
    """The advice helps: delete the manifest alone; cache-ref writes it again."""
    cached(models[0], -1.0, context)
    source = ModelSource("model0", models[0])
    store = store_of(source, COMPUTE, context)
    path, body = store.folder / "manifest.json", json.loads((store.folder / "manifest.json").read_text())
    body["identity"]["dtype"] = "bfloat16"
    for content in (b"", b"{", b"[]", b"{}", json.dumps(body).encode()):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match=r"manifest\.json .*Delete \S+manifest\.json and run"):
            store_of(source, COMPUTE, context)
    path.unlink()
    store = store_of(source, COMPUTE, context)
    assert list(store.missing([KEY])) == []
    remember_store(source, COMPUTE, store, context)
    assert path.is_file()


def test_stores_whose_folders_were_swapped_by_name_are_refused_with_a_way_out(models, context):
    """`align cache-ref`, which was the advice, gave the same line again."""
    for number, value in ((0, -1.0), (1, -2.0)):
        cached(models[number], value, context)
    sources = [ModelSource(folder.name, folder) for folder in models]
    one, two = (store_of(source, COMPUTE, context).folder for source in sources[:2])
    one.rename(one.with_name("away"))
    two.rename(one)
    with pytest.raises(StaleError, match=rf"belongs to another reference: .*-{two.name[-12:]}") as refused:
        store_of(sources[0], COMPUTE, context)
    assert "cache-ref" not in str(refused.value)
    one.rename(two)
    one.with_name("away").rename(one)
    assert [found(folder, context) for folder in models[:2]] == [-1.0, -2.0]


def test_a_hub_name_leads_to_the_copy_on_this_machine(models, context, said, tmp_path, monkeypatch):
    """Its main branch may have moved, or the copy may be gone; the network is not asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    repository = tmp_path / "hub" / "models--someone--model"
    commits = ["a" * 40, "b" * 40]
    for commit, folder in zip(commits, models, strict=False):
        shutil.move(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    source = ModelSource("someone/model", repository / "snapshots" / commits[0], is_on_hub=True)
    store = store_of(source, COMPUTE, context)
    store.add([KEY], [np.array([-1.0])])
    remember_store(source, COMPUTE, store, context)
    assert found("someone/model", context) == -1.0
    (repository / "refs" / "main").write_text(commits[1])
    with pytest.raises(StaleError, match=r"size or date of config\.json, model\.safetensors"):
        found("someone/model", context)
    shutil.rmtree(repository)
    assert found("someone/model", context) == -1.0
    assert "someone/model is gone" in said[-1]


FIELDS = ["weights", "architecture", "dtype", "scorer_version"]


def test_the_fields_of_a_reference_are_these(models):
    assert sorted(reference_identity(resolve_model(str(models[0]), None), COMPUTE)) == sorted(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_reference_that_differs_in_a_field_is_refused_by_its_name(field, models, context):
    cached(models[0], -1.0, context)
    source = resolve_model(str(models[0]), None)
    start = reference_identity(source, COMPUTE)
    other = {"weights": "0" * 64, "dtype": "bfloat16", "scorer_version": 0}.get(
        field, {**start["architecture"], "hidden_act": "gelu"}
    )
    changed = f"{field}.hidden_act" if field == "architecture" else field
    with pytest.raises(StaleError, match=rf"starting weights: {changed}: .* Run: align cache-ref") as caught:
        open_start(source, {**start, field: other}, COMPUTE, context)
    assert caught.value.exit_code == 4
    assert open_start(source, start, COMPUTE, context).get(KEY).tolist() == [-1.0]
    folder = store_of(source, COMPUTE, context).folder
    with pytest.raises(StaleError, match=f"belongs to another reference: {changed}: "):
        RefLogps(folder, {**start, field: other})
