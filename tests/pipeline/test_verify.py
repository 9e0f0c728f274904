"""`align verify` says what is damaged, missing or does not fit, whatever the digests say, and writes nothing."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from cache.files import read_json, sha256_file, with_digest, write_json
from cache.ref_logps import RefLogps
from cache.shards import write_content_named_shard
from tests.pipeline.small_run import run, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tiny_model, shared_preferences, tmp_path_factory) -> tuple[Path, Path]:
    """A configuration, and a store with rows, log-probs and a policy."""
    folder = tmp_path_factory.mktemp("verify")
    tree = settings(tiny_model, shared_preferences, train={"num_epochs": 1})
    run(tree, folder / "store", "prepare", "cache-ref", "train")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml", folder / "store"


@pytest.fixture
def store(made, tmp_path) -> Path:
    return shutil.copytree(made[1], tmp_path / "store")


def read(path: Path) -> pa.Table:
    """Into memory: a file that is mapped must not be written."""
    return pa.ipc.open_file(path.read_bytes()).read_all()


def the(store: Path, kind: str) -> Path:
    return next(path for path in (store / kind).iterdir() if (path / "manifest.json").is_file())


def reference_of(store: Path) -> RefLogps:
    folder = the(store, "ref-logps")
    return RefLogps(folder, read_json(folder / "manifest.json")["identity"])


def replace_values(store: Path, change) -> None:
    """All log-probs changed by `change(key, values)`, in shards with valid digests."""
    folder, reference = the(store, "ref-logps"), reference_of(store)
    for path in sorted(folder.glob("*.arrow")):
        table = read(path)
        keys = table.column("row_key").to_pylist()
        path.unlink()
        values = [change(key, reference.get(key)) for key in keys]
        columns = [
            table.column("row_key"),
            pa.array([list(map(float, one)) for one in values], table.schema.field(1).type),
        ]
        write_content_named_shard(folder, pa.table(columns, schema=table.schema))


def state(store: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(store.rglob("*")) if path.is_file()}


def verify(align, store: Path, *more) -> tuple[int, dict]:
    code, out, _ = align("verify", "--store", store, "--json", *more)
    return code, json.loads(out)


def problems(report: dict) -> list[str]:
    return [problem for one in report["artifacts"] for problem in one["problems"]]


def test_a_store_as_it_was_written_is_right_and_stays_as_it_is(align, made, store):
    before = state(store)
    assert verify(align, store)[0] == 0
    assert state(store) == before
    code, report = verify(align, store, "-c", made[0], "--rescore", 10)
    assert (code, report["ok"], problems(report)) == (0, True, [])
    assert report["rescored"] == {"rows": 10, "token": 0.0, "row": 0.0, "tolerance": 1e-3}
    assert {Path(one["path"]).parent.name for one in report["artifacts"]} == {"rows", "ref-logps", "policy"}


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("rows", "*.arrow"), ("ref-logps", "*.arrow"), ("policy", "*.safetensors"), ("policy", "metrics.jsonl")],
)
def test_a_flipped_bit_in_any_kind_of_file_is_5(align, store, kind, pattern):
    path = next(the(store, kind).glob(pattern))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, report = verify(align, store)
    assert code == 5
    assert len(problems(report)) == 1
    assert str(path) in problems(report)[0]


@pytest.mark.parametrize(("kind", "pattern"), [("rows", "*.arrow"), ("policy", "config.json")])
def test_a_missing_file_is_4(align, store, kind, pattern):
    next(the(store, kind).glob(pattern)).unlink()
    assert verify(align, store)[0] == 4


def test_a_folder_under_another_name_is_4(align, store):
    policy = the(store, "policy")
    policy.rename(policy.with_name("policy-000000000000"))
    code, report = verify(align, store)
    assert code == 4
    assert "Rename it" in problems(report)[0]


def test_a_key_that_is_not_that_of_its_tokens_is_5(align, store):
    """A row exchanged under digests that fit."""
    folder = the(store, "rows")
    path = next(folder.glob("train-*.arrow"))
    table = read(path)
    keys = table.column("row_key").to_pylist()
    swapped = pa.array([keys[1], keys[0], *keys[2:]], table.schema.field("row_key").type)
    table = table.set_column(table.schema.get_field_index("row_key"), "row_key", swapped)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = read_json(folder / "manifest.json")
    manifest.pop("manifest_sha256")
    for record in manifest["files"]:
        if record["name"] == path.name:
            record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(folder / "manifest.json", with_digest(manifest, "manifest_sha256"))
    code, report = verify(align, store)
    assert code == 5
    assert "is not that of its token ids" in problems(report)[0]


def test_log_probs_of_another_length_than_the_rows_are_5(align, store):
    replace_values(store, lambda key, values: values[:-1])
    code, report = verify(align, store)
    assert code == 5
    assert "log-probs of row" in problems(report)[0]


def test_two_log_probs_of_one_row_are_5(align, store):
    reference = reference_of(store)
    key = reference.keys()[0]
    columns = [
        pa.array([key], pa.binary(16)),
        pa.array([list(map(float, reference.get(key) - 1))], pa.list_(pa.float32())),
    ]
    path = next(reference.folder.glob("*.arrow"))
    schema = read(path).schema
    write_content_named_shard(reference.folder, pa.table(columns, schema=schema))
    code, report = verify(align, store)
    assert code == 5
    assert "has other log-probs in another shard" in problems(report)[0]


def test_rescoring_finds_what_no_digest_can(align, made, store):
    """Every value off by 0.01 nats, under digests that fit."""
    replace_values(store, lambda key, values: np.minimum(values - np.float32(0.01), 0))
    assert verify(align, store)[0] == 0
    code, report = verify(align, store, "-c", made[0], "--rescore", 5)
    assert code == 5
    assert report["rescored"]["token"] == pytest.approx(0.01, rel=1e-3)


def test_a_pinned_manifest(align, store):
    policy = the(store, "policy")
    digest = sha256_file(policy / "manifest.json")
    assert verify(align, store, policy, "--expect-digest", digest)[0] == 0
    assert verify(align, store, policy, "--expect-digest", "0" * 64)[0] == 5


def test_what_a_policy_was_made_from_and_is_gone_is_noted(align, store):
    shutil.rmtree(store / "rows")
    code, report = verify(align, store)
    assert code == 0
    assert any("was made from rows" in note for one in report["artifacts"] for note in one["notes"])


def test_an_empty_place_is_4(align, tmp_path):
    assert align("verify", tmp_path / "nothing")[0] == 4
