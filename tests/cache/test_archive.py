"""Portable files: the same bytes for the same content, and nothing in one is believed."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from cache.archive import DIGEST, LIST, unpack_archive, write_archive
from cache.artifacts import Store, open_artifact
from cache.errors import CorruptError, DataError, StaleError, UsageError
from cache.files import read_json, with_digest, write_json
from cache.locations import open_to_read, write_whole
from cache.ref_logps import RefLogps
from cache.shards import write_content_named_shard
from stages.sharing import export_archive, import_archive

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
REF_LOGPS = next((GOLDEN / "ref-logps").iterdir())
ROWS = next((GOLDEN / "rows").iterdir())


def packed(path: Path = GOLDEN) -> bytes:
    file = io.BytesIO()
    export_archive(path, file)
    return file.getvalue()


def take(content: bytes, store: Store):
    return import_archive(io.BytesIO(content), "a.tar", store)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".checked.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def archive(files: dict[str, bytes], listed: dict | None = None, members=None, **changes) -> bytes:
    """An archive written by hand, so that it may be what `write_archive` never writes."""
    import hashlib

    records = [
        {"name": name, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in (files if listed is None else listed).items()
    ]
    header = with_digest({"archive_version": 1, "files": records, **changes}, DIGEST)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, content in {LIST: json.dumps(header).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in members or ():
            tar.addfile(member)
    return file.getvalue()


def test_what_was_exported_is_imported_byte_by_byte_and_then_reused(tmp_path):
    store = Store(tmp_path / "store")
    first = take(packed(), store)
    assert [(one.path.parent.name, one.reused) for one in first] == [("ref-logps", False), ("rows", False)]
    assert content_of(store.root) == content_of(GOLDEN)
    assert [one.reused for one in take(packed(), store)] == [True, True]
    assert packed(store.root) == packed()
    assert sorted(path.name for path in store.root.iterdir()) == ["ref-logps", "rows"]


def test_the_bytes_depend_on_the_content_alone(tmp_path):
    copy = tmp_path / "copy"
    for path in sorted(GOLDEN.rglob("*"), reverse=True):
        if path.is_file():
            target = copy / path.relative_to(GOLDEN)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            target.chmod(0o600)
    assert packed(copy) == packed()
    assert packed(ROWS) != packed()


def test_any_tar_reads_it(tmp_path):
    (tmp_path / "a.tar").write_bytes(packed())
    shutil.unpack_archive(tmp_path / "a.tar", tmp_path / "out", filter="data")
    (tmp_path / "out" / LIST).unlink()
    assert content_of(tmp_path / "out") == content_of(GOLDEN)


def test_log_probs_are_put_together_shard_by_shard(tmp_path):
    """Whatever the folder is called that has those of the same reference."""
    identity = read_json(REF_LOGPS / "manifest.json")["identity"]
    folder = tmp_path / "store" / "ref-logps" / REF_LOGPS.name.replace("golden", "other")
    RefLogps(folder, identity).add([b"k" * 16], [[-1.5]])
    (arrived,) = take(packed(REF_LOGPS), Store(tmp_path / "store"))
    assert (arrived.path, arrived.reused) == (folder, False)
    merged = RefLogps(folder, identity)
    assert len(merged) == 4
    assert merged.get(b"k" * 16).tolist() == [-1.5]
    assert [path.name for path in (tmp_path / "store" / "ref-logps").iterdir()] == [folder.name]


@pytest.mark.slow
def test_a_flip_in_any_byte_is_noticed_or_changes_no_file(tmp_path, record_property):
    content, original = packed(REF_LOGPS), content_of(GOLDEN)
    contents = [
        (content.index(part), content.index(part) + len(part)) for part in content_of(REF_LOGPS).values()
    ]
    positions = range(0, len(content), 17)
    record_property("cases", len(positions))
    for position in positions:
        folder = tmp_path / str(position)
        folder.mkdir()
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        try:
            unpack_archive(io.BytesIO(flipped), folder, "a.tar")
        except (CorruptError, StaleError) as error:
            assert str(error).startswith(("a.tar", LIST))  # noqa: PT017
        else:
            assert (
                content_of(folder).items() <= original.items()
            )  # padding, and fields of tar that are not used
            assert not any(begin <= position < end for begin, end in contents)


def test_a_cut_at_any_length_is_noticed(tmp_path, record_property):
    content = packed(REF_LOGPS)
    end = len(content.rstrip(b"\0"))
    lengths = (*range(0, end, 97), end - 1)
    record_property("cases", len(lengths))
    for length in lengths:
        store = Store(tmp_path / str(length))
        with pytest.raises(CorruptError):
            take(content[:length], store)
        assert list(store.root.iterdir()) == []


def test_a_damaged_artifact_is_not_exported(tmp_path):
    for source, kind in ((ROWS, "rows"), (REF_LOGPS, "ref-logps")):
        folder = Path(shutil.copytree(source, tmp_path / kind / source.name))
        path = next(folder.glob("*.arrow"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(CorruptError, match="is damaged"):
            packed(folder)


def test_another_version_is_refused_by_name(tmp_path):
    with pytest.raises(StaleError, match="has archive version 2; this align reads 1"):
        take(archive({}, archive_version=2), Store(tmp_path))


NAMES = [
    "../x",
    "/x",
    "rows/../../x",
    "rows/./x",
    "rows//x",
    "",
    "rows/",
    "rows/.hidden",
    "rows/a\\..\\x",
    "C:/x",
    "rows/a:b",
    "rows/a\nb",
]
NAMES += ["rows/" + "n" * 300, "rows/\ud800", "rows/" + "é" * 200, ".", "..", "rows/a\x7fb"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_leads_elsewhere_is_refused_and_nothing_is_written(name, tmp_path):
    """Listed and held; as a path it would be written where it leads."""
    try:
        content = archive({"rows/a-1/b": b"1", name: b"2"})
    except UnicodeEncodeError:  # tar cannot hold it: the list alone does
        content = archive({"rows/a-1/b": b"1"}).replace(b"rows/a-1/b", b"rows/\\ud800", 1)
    store = Store(tmp_path / "in" / "store")
    with pytest.raises(CorruptError):
        take(content, store)
    assert list(tmp_path.rglob("*")) == [tmp_path / "in", tmp_path / "in" / "store"]


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]
)
def test_what_is_no_plain_file_is_refused(kind, tmp_path):
    listed = {"rows/a-1/b": b""}
    with pytest.raises(CorruptError):
        take(archive({}, listed, [link("rows/a-1/b", kind)]), Store(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        ({"rows/a/b": b"1"}, {}),
        ({}, {"rows/a/b": b"1"}),
        ({"rows/a/b": b"1"}, {"rows/a/c": b"1"}),
        ({"rows/a/b": b"1"}, {"rows/a/b": b"2"}),
        ({"rows/a/b": b"1"}, {"rows/a/b": b"22"}),
        ({"rows/b": b"1"}, None),
        ({"elsewhere/a-1/b": b"1"}, None),
        ({"rows/a-1/b": b"1"}, None),
        ({"ref-logps/a-1/manifest.json": b"[]"}, None),
        ({"ref-logps/by-place/0123456789ab.json": b"{}"}, None),
    ],
)
def test_what_is_no_whole_artifact_is_refused(files, listed, tmp_path):
    with pytest.raises((CorruptError, StaleError)):
        take(archive(files, listed), Store(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_twice_is_refused(tmp_path):
    again = tarfile.TarInfo("rows/a-1/b")
    with pytest.raises(CorruptError, match="holds more than its list"):
        take(archive({"rows/a-1/b": b"1"}, None, [again]), Store(tmp_path))


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 1024, b"[" * 2000, b"PK\3\4" + b"x" * 600])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    with pytest.raises(CorruptError, match="archive of `align export`"):
        take(content, Store(tmp_path))


def repacked(folder: Path, kind: str = "rows") -> bytes:
    return archive({f"{kind}/{folder.name}/{name}": content for name, content in content_of(folder).items()})


def test_digests_that_fit_do_not_make_an_artifact(tmp_path):
    """An archive whose own list is right, of a folder that was changed."""
    other_name = Path(shutil.copytree(ROWS, tmp_path / "rows-000000000000"))
    unlisted = Path(shutil.copytree(ROWS, tmp_path / "unlisted" / ROWS.name))
    (unlisted / "extra.txt").write_text("x")
    newer = Path(shutil.copytree(ROWS, tmp_path / "newer" / ROWS.name))
    manifest = read_json(newer / "manifest.json")
    del manifest["manifest_sha256"]
    write_json(newer / "manifest.json", with_digest({**manifest, "manifest_version": 2}, "manifest_sha256"))
    positive = Path(shutil.copytree(REF_LOGPS, tmp_path / "positive" / REF_LOGPS.name))
    schema = pa.ipc.open_file(next(positive.glob("*.arrow"))).schema
    write_content_named_shard(
        positive, pa.table({"row_key": [b"k" * 16], "token_logps": [[0.5]]}, schema=schema)
    )
    cases = {
        "not the artifact that its name says": repacked(other_name),
        "is listed nowhere": repacked(unlisted),
        "manifest version 2": repacked(newer),
        "is not a log-prob": repacked(positive, "ref-logps"),
    }
    for words, content in cases.items():
        store = Store(tmp_path / "store")
        with pytest.raises((CorruptError, StaleError), match=rf"a\.tar.*{words}"):
            take(content, store)
        assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_an_archive_travels_through_any_file_system(tmp_path):
    url = "memory://bucket/store.tar"
    write_whole(url, lambda file: export_archive(GOLDEN, file))
    with open_to_read(url) as file:
        import_archive(file, url, Store(tmp_path / "store"))
    assert content_of(tmp_path / "store") == content_of(GOLDEN)
    open_artifact(tmp_path / "store" / "rows" / ROWS.name).check_files()


@pytest.mark.slow
def test_a_place_that_cannot_be_reached_is_one_line(tmp_path):
    for where, error, words in (
        ("memory://nothing.tar", DataError, "is not there"),
        (str(tmp_path / "nothing.tar"), DataError, "is not there"),
        ("nowhere://x", UsageError, "Expected s3://"),
        ("http://127.0.0.1:9/x.tar", DataError, "is not there"),  # so fsspec says of every failure
    ):
        with pytest.raises(error, match=words), open_to_read(where):
            pass


def test_a_write_that_fails_leaves_no_object():
    from fsspec.implementations.memory import MemoryFileSystem

    def write(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_whole("memory://bucket/half.tar", write)
    assert not MemoryFileSystem().exists("/bucket/half.tar")


def test_the_list_is_written_by_the_sizes_of_its_files(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    file = io.BytesIO()
    assert write_archive(file, {"x/y/f": tmp_path / "f"}, {}) == 3
    assert unpack_archive(io.BytesIO(file.getvalue()), tmp_path / "out", "a.tar") == ["x/y/f"]
    assert (tmp_path / "out" / "x" / "y" / "f").read_bytes() == b"abc"
