"""Files appear whole or not at all, and what the disk refuses is one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cache.errors import CorruptError, MachineError
from cache.files import (
    atomic_path,
    publish_folder,
    read_json,
    read_with_digest,
    sha256_file,
    with_digest,
    write_bytes,
    write_json,
)
from tests.full_disk import full_disk

OLD, NEW = b"old", b"new content"
ROOT = Path(__file__).resolve().parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    write_bytes(path, OLD)
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert names(path.parent) == ["file"]


def test_the_old_bytes_are_never_written_over(tmp_path):
    """Another name of the old file still shows it whole, as does a reader who has it open."""
    write_bytes(tmp_path / "file", OLD)
    os.link(tmp_path / "file", tmp_path / "other name")
    with open(tmp_path / "file", "rb") as reader:
        write_bytes(tmp_path / "file", NEW)
        assert reader.read() == OLD
    assert (tmp_path / "other name").read_bytes() == OLD


def test_an_exception_halfway_leaves_the_old_file(tmp_path):
    write_bytes(tmp_path / "file", OLD)

    def write():
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_bytes(NEW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert (tmp_path / "file").read_bytes() == OLD
    assert names(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    write_bytes(tmp_path / "file", OLD)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(NEW)
        assert (tmp_path / "file").read_bytes() == OLD
        assert temporary.parent == tmp_path  # a rename across file systems would not be atomic


@pytest.mark.slow
def test_a_kill_halfway_leaves_the_old_file(tmp_path):
    write_bytes(tmp_path / "file", OLD)
    script = (
        "import os, pathlib, signal, sys; from cache.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == OLD
    write_bytes(tmp_path / "file", NEW)  # what the dead writer left is in nobody's way
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    write_bytes(tmp_path / "file", OLD)
    with (
        pytest.raises(MachineError, match=r"Cannot write .*file: File too large\. .*--store DIR"),
        full_disk(1000),
    ):
        write_bytes(tmp_path / "file", bytes(5000))
    assert (tmp_path / "file").read_bytes() == OLD
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(MachineError, match=r"Cannot write .*--store DIR"):
        write_bytes(tmp_path / "file" / "inside", NEW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(MachineError, match="Permission denied"):
            write_bytes(tmp_path / "file", NEW)
    finally:
        tmp_path.chmod(0o755)


def test_json_is_the_same_bytes_whatever_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": "é"})
    write_json(tmp_path / "b", {"a": "é", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_json(tmp_path / "a") == {"a": "é", "b": 1}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", float("nan"))
    assert read_json(tmp_path / "file") == 1
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1} x', b"\xff\xfe", b"\x00"])
def test_what_is_not_json_is_corrupt(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"file\.json is not readable JSON"):
        read_json(tmp_path / "file.json")


def test_a_bit_flipped_in_any_byte_of_an_object_with_a_digest_is_noticed(tmp_path):
    """It is one line, or it changes nothing: white space between values."""
    value = {"name": "ref", "files": {"a": [1, -2.5]}, "none": None, "text": "é \u2028 \\ \n"}
    path = tmp_path / "note.json"
    write_json(path, with_digest(value, "sha256"))
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytes([content[position] ^ (1 << position % 8)])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            assert read_with_digest(path, "sha256", "Do this.") == with_digest(value, "sha256")
        except CorruptError as error:
            assert str(error).startswith(f"{path} ")  # noqa: PT017
            assert str(error).endswith(" Do this.")  # noqa: PT017


@pytest.mark.parametrize(
    "content", [b"[]", b"1", b"null", b'{"a": NaN}', b'{"a": "\\ud800"}', b"{}", b"[" * 99_999]
)
def test_what_has_no_digest_is_corrupt(tmp_path, content):
    (tmp_path / "note.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"note\.json .* Do this\."):
        read_with_digest(tmp_path / "note.json", "sha256", "Do this.")


def test_sha256_of_a_file(tmp_path):
    """The published digest of `abc` (FIPS 180-2, appendix B.1)."""
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "file") == expected


def test_the_folder_that_was_published_first_stays(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
        publish_folder(tmp_path / name, tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final" / "inner" / "file").read_text() == "first"


def test_a_folder_that_cannot_be_published_stays_where_it_was(tmp_path):
    (tmp_path / "staging").mkdir()
    (tmp_path / "final").write_text("a file is in the way")
    with pytest.raises(MachineError, match="Cannot write"):
        publish_folder(tmp_path / "staging", tmp_path / "final")
    assert names(tmp_path) == ["final", "staging"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_published_folder_has_the_permissions_of_the_umask(tmp_path, umask, mode):
    """safetensors writes its files for their owner alone, so that nobody else could load a policy."""
    before = os.umask(umask)
    try:
        staging = tmp_path / "staging"
        (staging / "inner").mkdir(parents=True)
        save_file({"weight": np.zeros(3, np.float32)}, staging / "model.safetensors")
        (staging / "inner" / "config.json").write_text("{}")
        publish_folder(staging, tmp_path / "final")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "final").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        "model.safetensors": mode,
        "config.json": mode,
    }
