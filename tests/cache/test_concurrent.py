"""Processes that write one store at once, with locks that work and with locks that do nothing (as on many network file systems).

ALIGN_ROUNDS sets how often the races are run; `make reliability` runs more than `make test`.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cache import effects, ownership
from cache.artifacts import Store
from cache.errors import BusyError
from cache.files import TEMPORARY_PREFIX, write_bytes
from cache.kept_answers import KeptAnswers
from cache.ownership import claim, host, remove_abandoned
from cache.ref_logps import RefLogps

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("ALIGN_ROUNDS", "3"))
PROCESSES = 4
IDENTITY = {"source": "abc"}


def without_locks(function: Callable, *arguments):
    """Every lock is given to everybody."""
    return None if function.__name__ == "lock" else function(*arguments)


def with_locks(function: Callable, *arguments):
    return function(*arguments)


each_kind_of_lock = pytest.mark.parametrize(
    "locks", [with_locks, without_locks], ids=lambda one: one.__name__
)


def at_once(works: list[Callable[[], object]], locks: Callable) -> list[int]:
    """The exit codes of processes that begin together."""
    start = time.time() + 0.05 + 0.02 * len(works)
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                time.sleep(max(0.0, start - time.time()))
                with effects.run_by(locks):
                    work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def key(number: int) -> bytes:
    return bytes([number]) * 16


def score(folder: Path, numbers: list[int]) -> None:
    """As a worker of cache-ref: look, remove what dead ones left, add shard by shard."""
    reference = RefLogps(folder, IDENTITY)
    remove_abandoned(folder, TEMPORARY_PREFIX)
    for number in numbers:
        reference.add([key(number)], [np.full(3, -number, np.float32)])


@each_kind_of_lock
def test_writers_of_log_probs_give_one_store(locks, tmp_path, record_property):
    """Each has rows of its own, and some that all have: these are one shard."""
    record_property("cases", ROUNDS)
    for round_ in range(ROUNDS):
        folder = tmp_path / str(round_)
        works = [partial(score, folder, [own * 10, 1, own * 10 + 1, 2]) for own in range(1, PROCESSES + 1)]
        assert at_once(works, locks) == [0] * PROCESSES
        reference = RefLogps(folder, IDENTITY)
        numbers = [1, 2, *(own * 10 + more for own in range(1, PROCESSES + 1) for more in (0, 1))]
        assert len(reference) == len(numbers) == len(list(folder.glob("*.arrow")))
        assert all(reference.get(key(number)).tolist() == [-number] * 3 for number in numbers)
        assert list(folder.glob(f"{TEMPORARY_PREFIX}*")) == []


def publish(root: Path, value: int) -> None:
    store = Store(root)
    draft = store.draft("rows", "name", "prepare", IDENTITY)
    try:
        for number in range(3):
            draft.write_shard(f"train-0000{number}.arrow", pa.table({"x": [value]}))
        store.publish(draft, {}, {}, "train: {}\n")
    finally:
        draft.discard()


def read(root: Path) -> list | None:
    found = Store(root).find("rows", "name", IDENTITY)
    return None if found is None else [table.column("x").to_pylist() for table in found.shards("train-")]


@each_kind_of_lock
def test_publishers_of_one_artifact_leave_one_of_them_whole_and_readers_see_it_or_nothing(
    locks, tmp_path, record_property
):
    record_property("cases", ROUNDS)
    for round_ in range(ROUNDS):
        root = tmp_path / str(round_)
        whole = [[[value]] * 3 for value in range(PROCESSES)]

        def look(root: Path = root, whole: list = whole) -> None:
            for _ in range(30):
                assert read(root) in (None, *whole)

        works = [partial(publish, root, value) for value in range(PROCESSES)]
        assert at_once([*works, look, look], locks) == [0] * (PROCESSES + 2)
        assert read(root) in whole
        assert len(list((root / "rows").iterdir())) == 1


def test_a_file_that_is_replaced_again_and_again_is_always_whole(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([value]) * 50_000 for value in range(PROCESSES)]
    write_bytes(path, contents[0])

    def replace(content: bytes) -> None:
        for _ in range(20):
            write_bytes(path, content)

    def look() -> None:
        for _ in range(200):
            assert path.read_bytes() in contents

    works = [partial(replace, content) for content in contents]
    assert at_once([*works, look], with_locks) == [0] * (PROCESSES + 1)


def test_answers_of_several_processes_are_all_kept(tmp_path):
    def ask(own: int) -> None:
        answers = KeptAnswers(tmp_path)
        for number in range(10):
            answers.add({f"{own}-{number}": number})

    assert at_once([partial(ask, own) for own in range(PROCESSES)], with_locks) == [0] * PROCESSES
    answers = KeptAnswers(tmp_path)
    assert all(answers.get(f"{own}-{number}") == number for own in range(PROCESSES) for number in range(10))


def hold(folder: Path, ready: Path) -> int:
    """The id of a process that claims a folder, says so, and works on."""
    child = os.fork()
    if child == 0:
        ownership.BEAT_SECONDS = 0.02
        claim(folder)
        ready.touch()
        time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


@each_kind_of_lock
def test_a_second_owner_is_told_process_machine_and_time_and_a_killed_one_blocks_nobody(
    locks, tmp_path, monkeypatch
):
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 0.5)
    folder = tmp_path / "working"
    first = hold(folder, tmp_path / "ready")
    with effects.run_by(locks):
        said = rf"Process {first} on {host()} \(since 20.*\) is writing"
        with pytest.raises(BusyError, match=said):
            claim(folder, lambda _: None)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        claim(folder, pytest.fail).release()


def test_without_the_look_at_living_processes_a_lock_that_does_nothing_would_give_two_owners(
    tmp_path, monkeypatch
):
    folder = tmp_path / "working"
    first = hold(folder, tmp_path / "ready")
    monkeypatch.setattr(ownership, "_lives_beside", lambda process: False)
    with effects.run_by(without_locks):
        claim(folder, lambda _: None).release()
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
