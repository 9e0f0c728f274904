"""Artifacts: whole or absent, named by their identity, and every change of a stored byte noticed."""

import hashlib
import json
import os
import shutil

import pyarrow as pa
import pytest

from cache.artifacts import Store, open_artifact
from cache.errors import CorruptError, MachineError, StaleError
from cache.fingerprint import canonical_json

IDENTITY = {"source": "abc", "limits": {"max_length": 8}}


def publish(store, identity=IDENTITY, values=(1, 2, 3)):
    draft = store.draft("rows", "name", "prepare", identity)
    draft.write_shard("train-00000.arrow", pa.table({"x": list(values)}))
    draft.write_shard("train-00001.arrow", pa.table({"x": [9]}))
    (draft.path / "inner").mkdir()
    (draft.path / "inner" / "notes.txt").write_text("some notes")
    return store.publish(
        draft, {"rows": len(values)}, {"from": "here"}, "train: {}\n", data_path="pairs.jsonl"
    )


def read(artifact):
    return [table.column("x").to_pylist() for table in artifact.shards("train-")]


@pytest.fixture
def artifact(store):
    return publish(store)


def test_what_was_published_is_found_and_reads_back(store, artifact):
    found = store.find("rows", "name", IDENTITY)
    assert found is not None
    assert found.path == artifact.path
    assert read(found) == [[1, 2, 3], [9]]
    found.check_files()
    assert found.counts == {"rows": 3}
    assert found.manifest["identity"] == IDENTITY
    assert found.manifest["provenance"]["data_path"] == "pairs.jsonl"
    listed = [record["name"] for record in found.manifest["files"]]
    assert listed == ["config.yaml", "inner/notes.txt", "train-00000.arrow", "train-00001.arrow"]


def test_a_draft_cannot_be_found_before_it_is_published_nor_after_it_is_discarded(store):
    draft = store.draft("rows", "name", "prepare", IDENTITY)
    draft.write_shard("train-00000.arrow", pa.table({"x": [1]}))
    assert store.find("rows", "name", IDENTITY) is None
    draft.discard()
    assert store.find("rows", "name", IDENTITY) is None
    assert list(store.root.rglob("*.arrow")) == []


def test_looking_up_creates_nothing(store):
    assert store.find("rows", "name", IDENTITY) is None
    assert not store.root.exists()


def test_any_change_of_the_identity_is_another_folder(store, artifact):
    for other in (
        {**IDENTITY, "source": "abd"},
        {**IDENTITY, "limits": {"max_length": 9}},
        {**IDENTITY, "new": 0},
    ):
        assert store.find("rows", "name", other) is None
        assert publish(store, other).path != artifact.path
    assert store.find("rows", "name", dict(reversed(IDENTITY.items()))) is not None


def test_two_publishers_of_one_identity_leave_one_whole_artifact(store):
    """The second is drafted while the first is at work, in one process as two containers of one process id."""
    first, second = (store.draft("rows", "name", "prepare", IDENTITY) for _ in range(2))
    for draft in (first, second):
        draft.write_shard("train-00000.arrow", pa.table({"x": [1]}))
    published = [store.publish(draft, {}, {}, "") for draft in (first, second)]
    assert published[0].path == published[1].path
    assert read(published[1]) == [[1]]
    assert os.listdir(store.root / "rows") == [published[0].path.name]


@pytest.mark.slow
def test_a_kept_draft_is_taken_up_again(store):
    store.draft("policy", "name", "train", IDENTITY, keep=True).write_shard("a.arrow", pa.table({"x": [1]}))
    again = store.draft("policy", "name", "train", IDENTITY, keep=True)
    assert [path.name for path in again.path.iterdir()] == ["a.arrow"]


def test_a_store_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match=r"Cannot write .*--store DIR"):
        Store(tmp_path / "file").draft("rows", "name", "prepare", IDENTITY)


def flip(path, times_kept=False):
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if times_kept:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_damage_is_noticed_when_the_artifact_is_found(store, artifact):
    """Also where the time of modification is set back, and again after the first time."""
    for path in sorted(path for path in artifact.path.rglob("*") if path.is_file()):
        if path.name in ("manifest.json", ".checked.json"):
            continue
        content = path.read_bytes()
        for damage in (flip, lambda path: flip(path, times_kept=True), lambda path: path.write_bytes(b"")):
            damage(path)
            for _ in range(2):
                with pytest.raises(CorruptError, match=f"{path} is damaged"):
                    store.find("rows", "name", IDENTITY)
            path.write_bytes(content)
        path.unlink()
        with pytest.raises(StaleError, match=f"{path} is missing"):
            store.find("rows", "name", IDENTITY)
        path.write_bytes(content)
        assert store.find("rows", "name", IDENTITY) is not None


def test_files_that_have_not_changed_are_not_read_again(store, artifact):
    """A flipped file is believed where the note says that it was checked as it is now: only then is nothing read."""
    path = artifact.path / "inner" / "notes.txt"
    flip(path)
    noted = json.loads((artifact.path / ".checked.json").read_text())
    stat = path.stat()
    now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    noted["inner/notes.txt"][:4] = now
    (artifact.path / ".checked.json").write_text(json.dumps(noted))
    assert store.find("rows", "name", IDENTITY) is not None
    for broken in ("", "[]", '{"inner/notes.txt": null}'):
        (artifact.path / ".checked.json").write_text(broken)
        with pytest.raises(CorruptError, match=r"notes\.txt is damaged"):
            store.find("rows", "name", IDENTITY)


def test_a_copied_artifact_is_read_once(store, artifact):
    copied = Store(shutil.copytree(store.root, store.root.parent / "copy"))
    noted = copied.root / artifact.path.relative_to(store.root) / ".checked.json"
    before = noted.read_bytes()
    assert copied.find("rows", "name", IDENTITY) is not None
    assert noted.read_bytes() != before


def test_folders_that_were_exchanged_are_noticed(store, artifact):
    other = publish(store, {**IDENTITY, "limits": {"max_length": 9}})
    artifact.path.rename(store.root / "aside")
    other.path.rename(artifact.path)
    (store.root / "aside").rename(other.path)
    with pytest.raises(
        StaleError, match=r"another artifact than its name says \(limits.max_length: 9 -> 8\)"
    ):
        store.find("rows", "name", IDENTITY)


@pytest.mark.parametrize("name", ["config.yaml", "inner/notes.txt", "train-00000.arrow"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "delete"])
def test_damage_to_any_listed_file_is_noticed(artifact, name, damage):
    path = artifact.path / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-1], "grow": content + b"\0"}.get(damage, content))
    if damage == "delete":
        path.unlink()
    repair = f"Delete {artifact.path} and run `align prepare` again"
    with pytest.raises(StaleError if damage == "delete" else CorruptError, match=repair):
        open_artifact(artifact.path).check_files()
    if name.endswith(".arrow"):
        with pytest.raises((StaleError, CorruptError), match=repair):
            read(open_artifact(artifact.path))


def test_swapped_shards_are_noticed(artifact):
    first, second = (artifact.path / f"train-0000{number}.arrow" for number in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(CorruptError, match="train-00000"):
        read(open_artifact(artifact.path))


@pytest.mark.slow
def test_a_flip_of_any_byte_of_the_manifest_is_noticed(artifact, record_property):
    path = artifact.path / "manifest.json"
    content = path.read_bytes()
    record_property("cases", len(content) + len(content) // 16)
    for position in range(len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ (1 << position % 8)]) + content[position + 1 :]
        )
        with pytest.raises(CorruptError):
            open_artifact(artifact.path)
    for length in range(
        0, len(content) - 1, 16
    ):  # without its last byte, a line break, it still says the same
        path.write_bytes(content[:length])
        with pytest.raises(CorruptError):
            open_artifact(artifact.path)


@pytest.mark.parametrize("content", [b"[]", b"1", b'"text"', b"null", b"{}"])
def test_json_that_is_no_manifest_is_noticed(artifact, content):
    (artifact.path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptError, match="was changed after it was written"):
        open_artifact(artifact.path)


def test_editing_a_number_in_the_manifest_is_noticed(artifact):
    path = artifact.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"]["rows"] = 300
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="was changed after it was written"):
        open_artifact(artifact.path)


def test_a_manifest_of_another_version_is_refused_by_name(artifact):
    """As a later align would write it: consistent in itself, in a layout that this one does not know."""
    path = artifact.path / "manifest.json"
    manifest = {**json.loads(path.read_text()), "manifest_version": 2}
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(StaleError, match="has manifest version 2; this align reads 1"):
        open_artifact(artifact.path)


def test_a_folder_without_a_manifest_is_not_an_artifact(store, artifact):
    (artifact.path / "manifest.json").unlink()
    with pytest.raises(StaleError, match=r"no manifest\.json, so it is not a finished artifact"):
        store.find("rows", "name", IDENTITY)


def test_files_that_are_not_listed_are_not_read(artifact):
    (artifact.path / "train-00002.arrow").write_bytes((artifact.path / "train-00000.arrow").read_bytes())
    assert read(open_artifact(artifact.path)) == [[1, 2, 3], [9]]
