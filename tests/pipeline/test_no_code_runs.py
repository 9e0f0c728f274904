"""Whatever lies in data, stores, checkpoints, archives and model folders: none of it runs.

Each place holds what would run if it were opened the careless way. Work is done in a process of its own whose audit hook writes down what
pickles, programs, and Python files of these folders would do. Chat templates, whose sandbox is their own matter, and data are tested in
tests/stages/tokenization and tests/stages/prepare.
"""

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cache.archive import write_archive
from cache.artifacts import Store
from cache.errors import AlignError
from cache.files import read_json, sha256_file, with_digest, write_json
from cache.ref_logps import RefLogps
from cache.shards import SHARD_SUFFIX
from stages.sharing import import_archive
from tests.forked import in_child
from tests.pipeline.small_run import run, settings

pytestmark = pytest.mark.slow


class Bomb:
    """What unpickles into a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.fixture(scope="module")
def made(tiny_model, shared_preferences, tmp_path_factory) -> tuple[dict, Path]:
    """A configuration, and a store with rows, log-probs and an interrupted run with a checkpoint."""
    root = tmp_path_factory.mktemp("made")
    tree = settings(tiny_model, shared_preferences, train={"max_steps": 2, "save_steps": 1, "keep_last": 2})
    run(tree, root / "store", "prepare", "cache-ref", "train")
    return tree, root / "store"


def seen_by(work: Callable[[], object], watched: Path, tmp_path: Path) -> tuple[int, str]:
    """The exit code of work in a child, and the events that run code of the watched folder or any program."""
    log = tmp_path / "events"
    forbidden = (
        "pickle.find_class",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "socket.connect",
    )

    def hook(event: str, arguments: tuple) -> None:
        code = getattr(arguments[0], "co_filename", "") if event == "exec" else ""
        is_ours = event == "exec" and str(watched) in code
        harmless = event == "pickle.find_class" and arguments[0].split(".")[0] in (
            "torch",
            "collections",
            "numpy",
        )
        if is_ours or (event.startswith(forbidden) and not harmless):
            with log.open("a") as file:
                file.write(f"{event} {str(arguments)[:200]}\n")

    def watched_work() -> None:
        sys.addaudithook(hook)
        work()

    code = in_child(watched_work, tmp_path / "errors")
    return code, log.read_text() if log.exists() else ""


def careless(path: Path) -> None:
    with path.open("rb") as file:
        pickle.load(file)


def test_the_hook_sees_what_careless_code_runs(tmp_path):
    """Without the protection: a pickle is opened, and a module of the folder imported."""
    (tmp_path / "rows").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'marker2')!r}, 'w').close()")
    code, events = seen_by(lambda: careless(tmp_path / "rows"), tmp_path, tmp_path)
    assert code == 0
    assert (tmp_path / "marker").exists()
    assert "pickle.find_class" in events

    def imports() -> None:
        exec(compile((tmp_path / "mine.py").read_text(), str(tmp_path / "mine.py"), "exec"))

    assert "mine.py" in seen_by(imports, tmp_path, tmp_path)[1]
    assert (tmp_path / "marker2").exists()


def plant(folder: Path, marker: Path) -> None:
    """Beside the files of a folder: pickles and modules under names that libraries look for."""
    bomb = pickle.dumps(Bomb(marker))
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "scheduler.pt",
        "rng_state.pth",
        "optimizer.bin",
        "data.pkl",
    ):
        (folder / name).write_bytes(bomb)
    for name in (
        "modeling.py",
        "tokenization.py",
        "configuration.py",
        "conftest.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()")
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w').close()")


def with_digests(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of an artifact or checkpoint, with digests that fit."""
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    if (folder / "files.json").is_file():
        write_json(folder / "files.json", {**read_json(folder / "files.json"), name: digest})
        return
    manifest = read_json(folder / "manifest.json")
    del manifest["manifest_sha256"]
    for record in manifest["files"]:
        if record["name"] == name:
            record["sha256"] = digest
    write_json(folder / "manifest.json", with_digest(manifest, "manifest_sha256"))


def test_a_model_folder(made, shared_preferences, tmp_path):
    """Rows, log-probs and a step of training from it."""
    tree, _ = made
    marker, model = tmp_path / "marker", Path(shutil.copytree(tree["policy"]["model"], tmp_path / "model"))
    plant(model, marker)
    tokenizer = read_json(model / "tokenizer_config.json")
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization.Mine", "tokenization.Mine"]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = read_json(model / "config.json")
    config["_attn_implementation_internal"] = "someone/kernel"  # CVE-2026-4372
    (model / "config.json").write_text(json.dumps(config))
    ours = settings(model, shared_preferences, train={"max_steps": 1})
    code, events = seen_by(
        lambda: run(ours, tmp_path / "store", "prepare", "cache-ref", "train"), model, tmp_path
    )
    assert events == ""
    assert not marker.exists()
    assert code in (0, 1), (tmp_path / "errors").read_text()
    if code == 1:
        assert (
            "AlignError" in (tmp_path / "errors").read_text()
            or "Error: " in (tmp_path / "errors").read_text()
        )


@pytest.mark.parametrize("place", ["rows", "ref-logps"])
def test_shards_of_a_store(place, made, tmp_path):
    """A shard is a pickle, under a digest that fits."""
    tree, store = made
    root, marker = Path(shutil.copytree(store, tmp_path / "store")), tmp_path / "marker"
    folder = next(path for path in (root / place).iterdir() if (path / "manifest.json").is_file())
    bomb = pickle.dumps(Bomb(marker))
    path = next(folder.glob("*.arrow"))
    if place == "rows":
        with_digests(folder, path.name, bomb)
    else:
        path.unlink()
        (folder / f"{hashlib.sha256(bomb).hexdigest()}{SHARD_SUFFIX}").write_bytes(bomb)
    shutil.rmtree(root / "policy")
    code, events = seen_by(lambda: run(tree, root, "train"), root, tmp_path)
    assert (code, events) == (1, "")
    assert "CorruptError" in (tmp_path / "errors").read_text()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "state.json"])
def test_a_checkpoint_of_somebody_else(name, made, tmp_path):
    """Continued by `train.resume`; its own digests fit."""
    tree, store = made
    root, marker = Path(shutil.copytree(store, tmp_path / "store")), tmp_path / "marker"
    policy = next(path for path in (root / "policy").iterdir() if (path / "manifest.json").is_file())
    checkpoint = Path(shutil.copytree(policy / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-1"))
    bomb = pickle.dumps(Bomb(marker))
    if name == "optimizer.pt":
        torch.save({"state": Bomb(marker), "param_groups": []}, checkpoint / name)
        bomb = (checkpoint / name).read_bytes()
    with_digests(checkpoint, name, bomb)
    plant(checkpoint, marker)
    again = {**tree, "train": {**tree["train"], "max_steps": 3, "resume": str(checkpoint)}}
    code, events = seen_by(lambda: run(again, root, "train"), tmp_path / "elsewhere", tmp_path)
    assert (code, events.replace("pickle.find_class ('builtins', 'exec')\n", "")) == (1, "")
    assert any(
        kind in (tmp_path / "errors").read_text() for kind in ("CorruptError", "DataError", "StaleError")
    )
    assert not marker.exists()


def test_a_policy_folder(made, tmp_path):
    """What lies beside its listed files is not opened when it is evaluated."""
    tree, store = made
    root, marker = Path(shutil.copytree(store, tmp_path / "store")), tmp_path / "marker"
    policy = next(path for path in (root / "policy").iterdir() if (path / "manifest.json").is_file())
    plant(policy, marker)
    code, events = seen_by(lambda: run(tree, root, "eval"), policy, tmp_path)
    assert (code, events) == (0, ""), (tmp_path / "errors").read_text()
    assert not marker.exists()


def test_an_archive(made, tmp_path):
    """Pickles in place of a manifest, of a shard and of a note."""
    _, store = made
    marker = tmp_path / "marker"
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(marker)))
    folder = next(path for path in (store / "rows").iterdir() if path.is_dir())
    places = (
        "rows/a-0123456789ab/manifest.json",
        "ref-logps/a-0123456789ab/manifest.json",
        "ref-logps/by-place/0123456789ab.json",
    )
    archives = [{place: tmp_path / "bomb"} for place in places]
    archives.append({f"rows/{folder.name}/{path.name}": path for path in folder.glob("[!.]*")})
    archives[-1][f"rows/{folder.name}/{next(folder.glob('*.arrow')).name}"] = tmp_path / "bomb"
    for number, files in enumerate(archives):
        with (tmp_path / "a.tar").open("wb") as file:
            write_archive(file, files, {})

        def take(number: int = number) -> None:
            with (tmp_path / "a.tar").open("rb") as file, pytest.raises(AlignError):
                import_archive(file, "a.tar", Store(tmp_path / f"store-{number}"))

        code, events = seen_by(take, tmp_path, tmp_path)
        assert (code, events) == (0, ""), (tmp_path / "errors").read_text()
        assert not marker.exists()


def test_extension_types_in_a_shard(made, tmp_path):
    """An Arrow file may name a type whose Python class rebuilds itself from a pickle (pyarrow.PyExtensionType)."""
    _, store = made
    marker, folder = tmp_path / "marker", next((store / "ref-logps").glob("*/manifest.json")).parent
    identity = read_json(folder / "manifest.json")["identity"]
    schema = pa.ipc.open_file(next(folder.glob("*.arrow"))).schema
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(marker)),
    }
    schema = pa.schema([schema.field(0), schema.field(1).with_metadata(metadata)], schema.metadata)
    table = pa.table({"row_key": [b"k" * 16], "token_logps": [[-1.0]]}, schema=schema)
    target = tmp_path / "ref"
    target.mkdir()
    with pa.OSFile(str(target / "x"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    (target / "x").rename(target / f"{sha256_file(target / 'x')}{SHARD_SUFFIX}")

    def opens() -> None:
        with suppress(AlignError):
            RefLogps(target, identity)

    code, events = seen_by(opens, tmp_path, tmp_path)
    assert (code, events) == (0, ""), (tmp_path / "errors").read_text()
    assert not marker.exists()
