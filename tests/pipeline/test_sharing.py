"""`align export` and `align import` on the command line, and what a reference needs to be found after them."""

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml

from cache.artifacts import Store
from cache.errors import CorruptError
from cache.files import read_json, with_digest, write_json
from stages.runtime.context import Context
from stages.sharing import export_archive, import_archive
from tests.pipeline.small_run import settings
from tests.stages.cache_ref.test_store_lookup import cached, found, save

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def golden(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def test_export_and_import_and_import_again(align, golden, tmp_path):
    code, out, _ = align("export", "--store", golden, "-o", "store.tar", "--json")
    assert code == 0
    packed = json.loads(out)
    assert sorted(Path(folder).parent.name for folder in packed["artifacts"]) == ["ref-logps", "rows"]
    for reused in (False, True):
        code, out, _ = align("import", "store.tar", "--store", "other", "--json")
        assert code == 0
        assert [one["reused"] for one in json.loads(out)["artifacts"]] == [reused, reused]
    assert align("verify", "--store", "other")[0] == 0
    assert align("export", "--store", "other", "-o", "again.tar")[0] == 0
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "store.tar").read_bytes()


def test_one_artifact_is_a_file_of_its_own(align, golden):
    folder = next((golden / "ref-logps").iterdir())
    assert align("export", folder, "-o", "one.tar")[0] == 0
    code, out, _ = align("import", "one.tar", "--store", "other")
    assert code == 0
    assert out.split()[:2] == ["imported", f"other/ref-logps/{folder.name}"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "--store", "golden"], 2, "name it with -o FILE"),
        (["export", "--store", "nothing", "-o", "a.tar"], 4, "holds no artifact"),
        (["export", "--store", "golden", "-o", "https://user:pw@host/a.tar"], 2, "contains a password"),
        (["export", "--store", "golden", "-o", "nowhere://a.tar"], 2, "Expected s3://"),
        (["import", "nothing.tar"], 3, "is not there"),
        (["import", "golden/text"], 5, "is no archive of `align export`"),
    ],
)
def test_what_cannot_be_done_is_one_line(align, golden, tmp_path, arguments, code, words):
    (golden / "text").write_text("text")
    ended, out, err = align(*arguments)
    assert (ended, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1
    assert "pw" not in err
    assert not list(tmp_path.glob("*.tar"))


def test_a_reference_whose_model_is_gone_is_found_in_another_store(tmp_path):
    """The archive holds the note that leads from the name of the model to its log-probs."""
    model = save(tmp_path / "model", 1)
    here, there = (Context(Store(tmp_path / name), log=lambda _: None) for name in ("here", "there"))
    cached(model, -1.0, here)
    archive = io.BytesIO()
    export_archive(here.store.root, archive)
    shutil.rmtree(model)
    shutil.rmtree(here.store.root)
    import_archive(io.BytesIO(archive.getvalue()), "a.tar", there.store)
    assert found(model, there) == -1.0


@pytest.mark.parametrize("store", ["../elsewhere-{}", "/elsewhere/x-{}", "ref-000000000000"])
def test_a_note_that_leads_elsewhere_is_refused(store, tmp_path):
    here = Context(Store(tmp_path / "here"), log=lambda _: None)
    cached(save(tmp_path / "model", 1), -1.0, here)
    note = next((here.store.root / "ref-logps" / "by-place").glob("*.json"))
    value = read_json(note)
    folder, digits = value["store"], value["store"].rsplit("-", 1)[1]
    del value["note_sha256"]
    write_json(note, with_digest({**value, "store": store.format(digits)}, "note_sha256"))
    archive = io.BytesIO()
    from cache.archive import write_archive

    files = {f"ref-logps/by-place/{note.name}": note}
    files |= {f"ref-logps/{folder}/{path.name}": path for path in (note.parent.parent / folder).iterdir()}
    write_archive(archive, files, {})
    with pytest.raises(CorruptError, match=r"a\.tar"):
        import_archive(io.BytesIO(archive.getvalue()), "a.tar", Store(tmp_path / "there"))
    assert not list((tmp_path / "there").rglob("by-place/*"))


@pytest.mark.slow
def test_stages_on_three_machines_meet_in_a_store_at_a_url(
    align, tiny_model, shared_preferences, tmp_path, monkeypatch
):
    """One prepares and scores, one trains, one finds the policy; each has a mirror of its own."""
    tree = settings(tiny_model, shared_preferences, train={"num_epochs": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    url = f"memory://bucket{tmp_path}"

    def on(machine: str, *command: str) -> dict:
        monkeypatch.setenv("ALIGN_MIRRORS", str(tmp_path / machine))
        code, out, err = align(*command, "-c", "run.yaml", "--store", url, "--json")
        assert code == 0, err
        return json.loads(out)

    on("first", "prepare")
    assert on("first", "cache-ref")["forwards"] > 0
    assert on("second", "cache-ref")["forwards"] == 0
    assert on("second", "train")["reused"] is False
    assert on("third", "train")["reused"] is True
    report = on("fourth", "verify")
    assert sorted(Path(one["path"]).parent.name for one in report["artifacts"]) == [
        "policy",
        "ref-logps",
        "rows",
    ]
    monkeypatch.setenv("ALIGN_MIRRORS", str(tmp_path / "fifth"))
    code, _, err = align("train", "--store", "https://user:pw@host/store")
    assert code == 2
    assert "pw" not in err
