"""A store on object storage: what one machine makes another finds, whole and verified, and whoever writes meanwhile.

The same tests run on fsspec's memory and, marked slow, on an S3 server of moto.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fsspec.core import url_to_fs

from cache.artifacts import Store
from cache.errors import AlignError, CorruptError, DataError, UsageError
from cache.files import with_digest
from cache.fingerprint import canonical_json
from cache.mirror import MirroredStore, mirror_of, open_store
from cache.ref_logps import RefLogps

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
IDENTITY = {"source": "abc"}
REFERENCE = {"weights": "w" * 64, "dtype": "float32"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an empty bucket on a server of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    url_to_fs("s3://bucket")[0].mkdir("bucket")
    yield "s3://bucket"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    server.stop()


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request, tmp_path) -> str:
    """Of a store that is not there yet."""
    bucket = "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{bucket}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}/store"


@pytest.fixture
def machine(url, tmp_path, monkeypatch):
    """The store as a machine of this name sees it."""

    def see(name: str) -> MirroredStore:
        monkeypatch.setenv("ALIGN_MIRRORS", str(tmp_path / name))
        store = open_store(url)
        assert isinstance(store, MirroredStore)
        return store

    return see


def objects(url: str) -> dict[str, bytes]:
    system, root = url_to_fs(url)
    system.invalidate_cache()
    return {name.removeprefix(f"{root}/"): system.cat_file(name) for name in system.find(root)}


def change(url: str, name: str, content: bytes) -> None:
    system, root = url_to_fs(url)
    system.pipe_file(f"{root}/{name}", content)


def publish(store: Store, values=(1, 2, 3)):
    draft = store.draft("rows", "name", "prepare", IDENTITY)
    try:
        draft.write_shard("train-00000.arrow", pa.table({"x": list(values)}))
        draft.write_shard("train-00001.arrow", pa.table({"x": list(values)[::-1]}))
        return store.publish(draft, {"rows": len(values)}, {}, "train: {}\n")
    finally:
        draft.discard()


def read(store: Store) -> list | None:
    found = store.find("rows", "name", IDENTITY)
    return None if found is None else [part.column("x").to_pylist() for part in found.shards("train-")]


def test_what_one_machine_makes_another_finds(url, machine):
    assert read(machine("a")) is None
    publish(machine("a"))
    assert read(machine("b")) == [[1, 2, 3], [3, 2, 1]]
    shutil.rmtree(mirror_of(url))  # a machine that lost its mirror
    assert read(machine("b")) == [[1, 2, 3], [3, 2, 1]]


def test_a_plain_copy_of_a_local_store_is_one(url, machine, tmp_path):
    """As `aws s3 sync` or a web server's folder has it."""
    local = Store(tmp_path / "local")
    published = publish(local)
    for path in published.path.iterdir():
        change(url, f"rows/{published.path.name}/{path.name}", path.read_bytes())
    assert read(machine("a")) == [[1, 2, 3], [3, 2, 1]]


def test_damage_is_noticed_on_arrival_and_nothing_of_it_is_kept(url, machine, record_property):
    publish(machine("a"))
    record_property("cases", 3 * len(objects(url)))
    for name, content in objects(url).items():
        damages = [content[:-2], content + b"x", content[:9] + bytes([content[9] ^ 1]) + content[10:]]
        for damage in damages:
            change(url, name, damage)
            with pytest.raises(AlignError):
                read(machine("b"))
            assert [path for path in mirror_of(url).rglob("*") if path.is_file()] == []
        change(url, name, content)
    assert read(machine("b")) == [[1, 2, 3], [3, 2, 1]]


def test_without_the_manifest_nothing_is_there(url, machine):
    """A writer that was killed before its last put."""
    publish(machine("a"))
    name = next(name for name in objects(url) if name.endswith("manifest.json"))
    system, root = url_to_fs(url)
    system.rm_file(f"{root}/{name}")
    assert read(machine("b")) is None
    publish(machine("b"))
    assert read(machine("c")) == [[1, 2, 3], [3, 2, 1]]


def test_a_name_in_a_manifest_that_leads_elsewhere_is_refused(url, machine, tmp_path):
    publish(machine("a"))
    name = next(name for name in objects(url) if name.endswith("manifest.json"))
    manifest = json.loads(objects(url)[name])
    del manifest["manifest_sha256"]
    manifest["files"][0]["name"] = "../../../../outside"
    change(url, name, canonical_json(with_digest(manifest, "manifest_sha256")))
    with pytest.raises(CorruptError, match="no file inside of a folder"):
        read(machine("b"))
    assert not list(tmp_path.rglob("outside"))


def test_of_two_writers_of_different_bytes_one_stays_whole(url, machine):
    """Both looked before either had finished: what a machine reads is of one of them, never mixed."""
    a, b = machine("a"), machine("b")
    drafts = [store.draft("rows", "name", "prepare", IDENTITY) for store in (a, b)]
    for draft, values in zip(drafts, ([1], [2]), strict=True):
        draft.write_shard("train-00000.arrow", pa.table({"x": values}))
        draft.write_shard("train-00001.arrow", pa.table({"x": values}))
    a.publish(drafts[0], {}, {}, "")
    b.publish(drafts[1], {}, {}, "")
    assert read(machine("c")) == [[1], [1]]
    assert read(machine("b")) == [[2], [2]]  # its own mirror


# fsspec's memory shows an object before it is whole, which no object storage does.
@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_reader_beside_writers_sees_old_or_new(url, machine, tmp_path):
    """Writers of different bytes race; a fresh machine reads nothing, or one of them whole."""
    stores = [machine(f"writer-{number}") for number in range(4)]
    seen, done = [], threading.Event()

    def look_once() -> None:
        store = MirroredStore(url)
        store.root = tmp_path / f"reader-{len(seen)}"
        seen.append(read(store))

    def look() -> None:
        while not done.is_set() or len(seen) < 3:
            look_once()

    reader = threading.Thread(target=look)
    reader.start()
    writers = [
        threading.Thread(target=publish, args=(store, [number])) for number, store in enumerate(stores)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    look_once()  # the last of the reader's may have begun before any writer was done
    assert {str(one) for one in seen} <= {"None", *(f"[[{number}], [{number}]]" for number in range(4))}
    assert seen[-1] is not None


def add(store: MirroredStore, number: int) -> None:
    store.bring("ref-logps", f"*-{RefLogps(Path('x'), REFERENCE).fingerprint[:12]}")
    reference = logps(store)
    path = reference.add([bytes([number]) * 16], [np.full(2, -number, np.float32)])
    store.send(reference.folder / "manifest.json")
    store.send(path)


def logps(store: MirroredStore) -> RefLogps:
    digits = RefLogps(Path("x"), REFERENCE).fingerprint[:12]
    store.bring("ref-logps", f"*-{digits}")
    return RefLogps(store.root / "ref-logps" / f"model-{digits}", REFERENCE)


def test_machines_add_log_probs_to_one_store(url, machine):
    for number in range(1, 4):
        add(machine(f"machine-{number}"), number)
    for name in ("machine-1", "fresh"):
        assert len(logps(machine(name))) == 3
    assert logps(machine("fresh")).get(bytes([2]) * 16).tolist() == [-2.0, -2.0]


def test_what_was_not_put_back_is_put_back_later(url, machine):
    """The network failed after the work was done."""
    store = machine("a")
    Store.publish(store, draft_of(store), {}, {}, "")
    assert objects(url) == {}
    assert read(machine("a")) == [[7]]
    assert read(machine("b")) == [[7]]
    reference = logps(store)
    reference.add([b"k" * 16], [np.array([-1.0])])
    machine("a").send(reference.folder)
    assert len(logps(machine("b"))) == 1


def draft_of(store: Store):
    draft = store.draft("rows", "name", "prepare", IDENTITY)
    draft.write_shard("train-00000.arrow", pa.table({"x": [7]}))
    return draft


@pytest.mark.slow
def test_a_folder_behind_http_can_be_read_and_not_written(tmp_path, monkeypatch):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    publish(Store(tmp_path / "store"))
    shutil.copytree(GOLDEN / "ref-logps", tmp_path / "store" / "ref-logps")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "store")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ALIGN_MIRRORS", str(tmp_path / "mirrors"))
    try:
        store = open_store(f"http://127.0.0.1:{server.server_port}")
        assert read(store) == [[1, 2, 3], [3, 2, 1]]
        store.bring("ref-logps", "*-025b4e4cdd3b")
        assert len(list((store.root / "ref-logps").rglob("*.arrow"))) == 1
        with pytest.raises(UsageError, match="can only be read"):
            store.draft("rows", "other", "prepare", {})
    finally:
        server.shutdown()


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_MIRRORS", str(tmp_path))
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x/rows/.* is not there, or cannot be reached"):
        open_store("s3://no-such-bucket/x").send(
            publish(Store(tmp_path / mirror_of("s3://no-such-bucket/x"))).path
        )
