"""Whatever change to the disk goes wrong, in whatever way: what is read is old or new, and the same command completes it.

Each loop goes on until a run reaches its end without a fault. With ALIGN_EVERY_CASE, which `make reliability` sets, every
change goes wrong in every way. Without, every change fails with one of the five errors, every fifth kills, and every second
loses power, of bytes and of names in turn. The last tests show that the loops find what they look for.
"""

import ast
import errno
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cache import effects
from cache.artifacts import Store
from cache.errors import AlignError, MachineError
from cache.files import TEMPORARY_PREFIX, read_json, write_bytes
from cache.kept_answers import KeptAnswers
from cache.ownership import remove_abandoned
from cache.ref_logps import RefLogps
from stages.sharing import export_archive, import_archive
from tests.faulty_disk import GROWING, OPENING, FailingDisk, KillingDisk, LosingDisk, PowerLoss

IDENTITY = {"source": "abc"}
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KEYS = [bytes([number]) * 16 for number in range(4)]


class Artifact:
    """A folder that appears whole."""

    name = "artifact"

    def prepare(self, root: Path) -> None:
        pass

    def write(self, root: Path) -> None:
        store = Store(root)
        if store.find("rows", "name", IDENTITY) is not None:
            return
        draft = store.draft("rows", "name", "prepare", IDENTITY)
        try:
            draft.write_shard("train-00000.arrow", pa.table({"x": [1, 2, 3]}))
            (draft.path / "inner").mkdir(exist_ok=True)
            (draft.path / "inner" / "notes.txt").write_text("some notes")
            store.publish(draft, {"rows": 3}, {}, "train: {}\n")
        finally:
            draft.discard()

    def check(self, root: Path) -> None:
        found = Store(root).find("rows", "name", IDENTITY)
        if found is not None:
            assert [table.column("x").to_pylist() for table in found.shards("train-")] == [[1, 2, 3]]
            assert (found.path / "inner" / "notes.txt").read_text() == "some notes"

    def is_done(self, root: Path) -> bool:
        return Store(root).find("rows", "name", IDENTITY) is not None


class Log:
    """Reference log-probs that are added to others."""

    name = "ref-logps"

    def _add(self, root: Path, numbers: range) -> None:
        reference = RefLogps(root / "ref", IDENTITY)
        remove_abandoned(reference.folder, TEMPORARY_PREFIX)
        for number in numbers:
            if KEYS[number] not in reference:
                reference.add([KEYS[number]], [np.full(2, -number, np.float32)])

    def prepare(self, root: Path) -> None:
        self._add(root, range(1))

    def write(self, root: Path) -> None:
        self._add(root, range(4))

    def check(self, root: Path) -> None:
        reference = RefLogps(root / "ref", IDENTITY)
        assert KEYS[0] in reference
        for number, key in enumerate(KEYS):
            assert key not in reference or reference.get(key).tolist() == [-number, -number]

    def is_done(self, root: Path) -> bool:
        return len(RefLogps(root / "ref", IDENTITY)) == 4


class Answers:
    """Answers of a paid service, appended to a file of this process."""

    name = "answers"

    def prepare(self, root: Path) -> None:
        KeptAnswers(root / "answers").add({"0": [0]})

    def write(self, root: Path) -> None:
        answers = KeptAnswers(root / "answers")
        for key in ("1", "2"):
            if key not in answers:
                answers.add({key: [int(key)]})

    def check(self, root: Path) -> None:
        answers = KeptAnswers(root / "answers")
        assert "0" in answers
        assert all(answers.get(key) == [int(key)] for key in "012" if key in answers)

    def is_done(self, root: Path) -> bool:
        return all(key in KeptAnswers(root / "answers") for key in "012")


class Replaced:
    """A file that takes the place of another."""

    name = "file"

    def __init__(self, write: Callable[[Path, bytes], None] = write_bytes) -> None:
        self._write = write

    def prepare(self, root: Path) -> None:
        write_bytes(root / "deep" / "file", b"old content")

    def write(self, root: Path) -> None:
        self._write(root / "deep" / "file", b"new content")

    def check(self, root: Path) -> None:
        assert (root / "deep" / "file").read_bytes() in (b"old content", b"new content")

    def is_done(self, root: Path) -> bool:
        return (root / "deep" / "file").read_bytes() == b"new content"


class Imported:
    """An archive of rows and log-probs, some of which are there."""

    name = "import"

    def __init__(self) -> None:
        self.archive = io.BytesIO()
        export_archive(GOLDEN, self.archive)

    def prepare(self, root: Path) -> None:
        pass

    def write(self, root: Path) -> None:
        import_archive(io.BytesIO(self.archive.getvalue()), "archive.tar", Store(root))

    def check(self, root: Path) -> None:
        for kind in ("rows", "ref-logps"):
            for folder in (root / kind).glob("golden-*"):
                for path in (GOLDEN / kind / folder.name).glob("[!.]*"):
                    assert (folder / path.name).read_bytes() == path.read_bytes()

    def is_done(self, root: Path) -> bool:
        return len(list(root.glob("*/golden-*"))) == 2


WORKS = [Artifact(), Log(), Answers(), Replaced(), Imported()]
each_work = pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)


def changes_to_try(first: int, step: int) -> Iterator[int]:
    """The numbers of the changes that go wrong: 1, 2, 3, ..., or with fewer cases `first`, `first + step`, ..."""
    return itertools.count(1) if "ALIGN_EVERY_CASE" in os.environ else itertools.count(first, step)


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one, because every test here waits for the disk hundreds of times."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def begin(work, folder: Path) -> Path:
    folder.mkdir()
    work.prepare(folder)
    return folder


def content(root: Path) -> dict:
    """The bytes of all files by name, without times, names of processes, and what was not finished."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if TEMPORARY_PREFIX in str(path.relative_to(root)):
            continue
        if path.name == "manifest.json":
            found[str(path.relative_to(root))] = {
                key: value
                for key, value in read_json(path).items()
                if key not in ("provenance", "manifest_sha256")
            }
        elif path.suffix == ".jsonl":
            found.setdefault("lines", set()).update(path.read_bytes().split(b"\n")[:-1])
        elif path.name != ".checked.json":
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def check_and_complete(work, root: Path, whole: dict) -> None:
    """What is read is old or new, and the same work again gives what it gives without a fault, and nothing more."""
    work.check(root)
    work.write(root)
    assert work.is_done(root)
    assert content(root) == whole


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


ERRORS = [
    ("ENOSPC", errno.ENOSPC, GROWING),
    ("EDQUOT", errno.EDQUOT, GROWING),
    ("EIO", errno.EIO, ()),
    ("EMFILE", errno.EMFILE, OPENING),
    ("EROFS", errno.EROFS, {*GROWING, "rename", "remove", "remove_tree", "set_mode", "touch", "truncate"}),
]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
@pytest.mark.parametrize(
    ("number", "lasting"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS]
)
@each_work
def test_an_error_at_any_change_is_one_line_and_the_same_command_completes(
    work, number, lasting, tmp_path, record_property
):
    work.write(begin(work, tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    cases = 0
    for n in changes_to_try(1 + [case[1] for case in ERRORS].index(number), len(ERRORS)):
        cases += 1
        root = begin(work, tmp_path / str(n))
        before, disk = open_files(), FailingDisk(n, number, lasting)
        try:
            with effects.run_by(disk):
                work.write(root)
            reported = ""
        except MachineError as error:
            reported = str(error)
        assert open_files() == before
        if reported:
            assert f"{os.strerror(number)}. " in reported
            assert "\n" not in reported
        else:  # a change that is not needed: a note, the end of a lock
            assert work.is_done(root)
            assert not disk.failed & {"write", "sync_file", "rename"}
        check_and_complete(work, root, whole)
        if not disk.failed & {"remove", "remove_tree"}:
            assert not list(root.rglob(f"{TEMPORARY_PREFIX}*"))
        if not disk.was_reached:
            break
    record_property("cases", cases)
    assert n > 5


@pytest.mark.slow
@each_work
def test_a_kill_at_any_change_leaves_old_or_new_and_the_same_command_completes(
    work, tmp_path, record_property
):
    work.write(begin(work, tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    cases = 0
    for n in changes_to_try(1 + WORKS.index(work), 5):
        cases += 1
        root = begin(work, tmp_path / str(n))
        child = os.fork()
        if child == 0:
            with effects.run_by(KillingDisk(n)):
                work.write(root)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        check_and_complete(work, root, whole)
        if code == 0:
            break
        assert code == 9
    record_property("cases", cases)
    assert n > 5


def lose_power(work, n: int, names_are_kept: bool, tmp_path: Path, skipped=()) -> tuple[Path, bool]:
    """The disk after a loss of power at the n-th change, and whether the work was done before."""
    root, after = begin(work, tmp_path / f"{n}-before"), tmp_path / f"{n}-after"
    with LosingDisk(n, root, skipped) as disk:
        try:
            with effects.run_by(disk):
                work.write(root)
            done = True
        except PowerLoss:
            done = False
        disk.after_loss(after, names_are_kept)
    shutil.rmtree(root)  # its locks would not outlive the machine either
    return after, done


def check_power_losses(work, names_are_kept: bool, tmp_path: Path, skipped=()) -> int:
    """The number of losses."""
    work.write(begin(work, tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    cases = 0
    for n in changes_to_try(1 if names_are_kept else 3, 4):
        cases += 1
        after, done = lose_power(work, n, names_are_kept, tmp_path, skipped)
        work.check(after)
        if done:
            assert work.is_done(after)  # what was reported as done is there
        check_and_complete(work, after, whole)
        if done:
            break
    assert n > 5
    return cases


@pytest.mark.parametrize("names_are_kept", [True, False], ids=["bytes", "names"])
@each_work
def test_a_loss_of_power_at_any_change_leaves_old_or_new(work, names_are_kept, tmp_path, record_property):
    record_property("cases", check_power_losses(work, names_are_kept, tmp_path))


# The same checks on writers without the protection: they fail.


def in_place(path: Path, content: bytes) -> None:
    with effects.open_for_writing(path) as file:
        file.write(content)
    effects.sync_file(path)
    for _ in range(5):
        effects.sync_folder(path.parent)


def killed_halfway(work, tmp_path: Path) -> Path:
    """The work, with every process killed in a write of its content."""
    root = begin(work, tmp_path / "root")
    with pytest.raises(PowerLoss), effects.run_by(LosingDisk(2, root)):
        work.write(root)
    return root


def test_a_file_written_in_place_would_be_read_by_half(tmp_path):
    work = Replaced(in_place)
    with pytest.raises(AssertionError):
        work.check(killed_halfway(work, tmp_path))


@pytest.mark.parametrize(
    ("work", "skipped", "names_are_kept"),
    [
        (Artifact(), "sync_file", True),
        (Artifact(), "sync_folder", False),
        (Log(), "sync_file", True),
        (Log(), "sync_folder", False),
        (Answers(), "sync_file", True),
        (Answers(), "sync_folder", False),
        (Replaced(), "sync_file", True),
        (Replaced(), "sync_folder", False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_without_one_kind_of_fsync_a_loss_of_power_would_be_noticed(work, skipped, names_are_kept, tmp_path):
    with pytest.raises((AssertionError, AlignError)):  # a missing row, a damaged file, a file of no bytes
        check_power_losses(work, names_are_kept, tmp_path, {skipped})


CHANGES = {
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "makedirs",
    "rmtree",
    "fsync",
    "truncate",
    "ftruncate",
}
CHANGES |= {
    "utime",
    "chmod",
    "fchmod",
    "link",
    "symlink",
    "flock",
    "write_bytes",
    "write_text",
    "OSFile",
    "pwrite",
}


def changing_calls(source: str) -> list[int]:
    """The lines with a method or a call of `open` that changes a disk."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute):
            is_path = call.func.attr != "replace" or len(call.args) == 1  # texts are given two
            if is_path and call.func.attr in CHANGES and getattr(call.func.value, "id", "") != "effects":
                found.append(call.lineno)
        elif getattr(call.func, "id", "") == "open":
            modes = [value.value for value in call.args[1:] if isinstance(value, ast.Constant)]
            found += [call.lineno for mode in modes if set("wax+") & set(str(mode))]
    return found


def test_no_other_file_of_the_folder_changes_a_disk():
    folder = Path(effects.__file__).parent
    assert changing_calls("os.fsync(handle)\npath.mkdir()\nopen(path, 'rb+')\neffects.rename(a, b)") == [
        1,
        2,
        3,
    ]
    found = {path.name: changing_calls(path.read_text()) for path in folder.glob("*.py")}
    assert found.pop("effects.py")
    assert {name: lines for name, lines in found.items() if lines} == {}
