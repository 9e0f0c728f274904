"""One writer at a time, named to the other; a dead one blocks nobody, and what it left is removed."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from cache import ownership
from cache.errors import BusyError
from cache.files import temporary_file
from cache.ownership import OWNER, claim, host, is_claimed, remove_abandoned

IDENTITY = {"source": "abc"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "working"


def leave_owner(folder: Path, of: str) -> Path:
    """The file of an owner that died without releasing it."""
    folder.mkdir(exist_ok=True)
    path = folder / OWNER
    path.write_text(json.dumps({"host": of, "pid": 2**22 + 1, "since": "2026-01-01 00:00:00+00:00"}))
    return path


def test_the_second_is_refused_and_told_who_the_first_is(folder):
    first = claim(folder)
    assert is_claimed(folder)
    said = rf"Process {os.getpid()} on {re.escape(host())} \(since \d{{4}}-\d\d-\d\d .*\) is writing {folder}"
    with pytest.raises(BusyError, match=said):
        claim(folder)
    first.release()
    assert not is_claimed(folder)
    claim(folder).release()
    assert os.listdir(folder) == []


def test_an_owner_that_died_on_this_machine_blocks_nobody(folder):
    leave_owner(folder, host())
    began = time.monotonic()
    claim(folder, log=pytest.fail).release()
    assert time.monotonic() - began < ownership.SILENT_SECONDS / 10


def test_an_owner_on_another_machine_is_believed_while_it_touches_its_file(folder, monkeypatch):
    """A file system whose locks do not reach other machines: the lock is free, and only the touches tell."""
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 0.5)
    path, said, ended = leave_owner(folder, "elsewhere"), [], threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=touch)
    beating.start()
    with pytest.raises(BusyError, match="on elsewhere"):
        claim(folder, said.append)
    ended.set()
    beating.join()
    assert "on elsewhere" in said[0]
    claim(folder, said.append).release()


def test_an_owner_touches_its_file(folder, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.02)
    own = claim(folder)
    before = (folder / OWNER).stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while (folder / OWNER).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    own.release()


def test_releasing_a_folder_that_was_removed_leaves_the_next_owner_alone(folder):
    first = claim(folder)
    shutil.rmtree(folder)
    second = claim(folder)
    first.release()
    assert is_claimed(folder)
    second.release()


def test_the_temporary_file_of_a_living_process_stays_and_that_of_a_dead_one_goes(folder):
    folder.mkdir()
    dead = folder / f".tmp-shard.{host()}.4194305.0123abcd"
    foreign, ancient = folder / ".tmp-shard.elsewhere.1.0123abcd", folder / ".tmp-shard.elsewhere.2.0123abcd"
    for path in (dead, foreign, ancient, folder / "shard.arrow"):
        path.write_bytes(b"cut")
    os.utime(ancient, (time.time() - 2 * ownership.OLD_SECONDS,) * 2)
    with temporary_file(folder, "shard") as living:
        remove_abandoned(folder, ".tmp-")
        assert sorted(folder.iterdir()) == sorted([living, foreign, folder / "shard.arrow"])


def test_the_next_draft_of_an_identity_removes_those_of_killed_processes(store):
    killed = store.draft("rows", "name", "prepare", IDENTITY)
    other = store.draft("rows", "other", "prepare", IDENTITY)
    living = store.draft("rows", "name", "prepare", IDENTITY)
    killed.release()  # as the end of its process does
    leave_owner(killed.path, host())
    (killed.path / "train-00000.arrow").write_bytes(b"cut")
    third = store.draft("rows", "name", "prepare", IDENTITY)
    assert set((store.root / "rows").iterdir()) == {living.path, other.path, third.path}
    for draft in (living, other, third):
        draft.discard()
    assert list((store.root / "rows").iterdir()) == []
