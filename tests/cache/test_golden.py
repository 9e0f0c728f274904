"""Files that version 1 of each format wrote, read by today's code and by other tools; the values stand here by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cache.artifacts import open_artifact
from cache.errors import StaleError
from cache.files import read_json, with_digest, write_json
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROWS = next((GOLDEN / "rows").iterdir())
REF_LOGPS = next((GOLDEN / "ref-logps").iterdir())
SHARD = ROWS / "train-00000.arrow"
COMPLETIONS = [[8, 2], [9, 9, 2], [3, 2]]
LOGPS = [[-0.5, -1.25], [-3.0, -0.125, -2.0], [0.0, -7.5]]


def test_prepared_rows_of_version_1() -> None:
    rows = RowSet.of(open_artifact(ROWS), "train")
    assert [rows.prompt(row).tolist() for row in range(3)] == [[5, 6, 7], [5, 6, 7], [5]]
    assert [rows.completion(row).tolist() for row in range(3)] == COMPLETIONS
    assert [rows.mask(row).tolist() for row in range(3)] == [[1, 1], [1, 0, 1], [1, 1]]
    assert rows.roles.tolist() == ["chosen", "rejected", "desirable"]
    assert rows.weights.tolist() == [1.0, 0.5, 1.0]
    assert rows.scores[:2].tolist() == [4.0, 1.5]
    assert np.isnan(rows.scores[2])
    assert list(rows.sources) == ["pairs.jsonl:1", "pairs.jsonl:1", "pairs.jsonl:2"]
    assert rows.starts.tolist() == [0, 2]


def test_reference_log_probs_of_version_1() -> None:
    """Under the keys of the rows: a hash of lengths and ids that must never change."""
    store = RefLogps(REF_LOGPS, read_json(REF_LOGPS / "manifest.json")["identity"])
    rows = RowSet.of(open_artifact(ROWS), "train")
    assert [store.get(key).tolist() for key in rows.keys] == LOGPS
    assert rows.keys[0].hex() == "c079e91913608b686a38d1d65c377147"


def test_another_version_of_a_manifest_is_refused_by_name(tmp_path) -> None:
    folder = shutil.copytree(ROWS, tmp_path / ROWS.name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("manifest_sha256")
    write_json(folder / "manifest.json", with_digest({**manifest, "manifest_version": 2}, "manifest_sha256"))
    with pytest.raises(StaleError, match=r"has manifest version 2; this align reads 1"):
        open_artifact(folder)


def test_pyarrow_reads_a_shard() -> None:
    assert pa.ipc.open_file(SHARD).read_all().column("completion_ids").to_pylist() == COMPLETIONS


def test_datasets_reads_a_shard(tmp_path) -> None:
    from datasets import load_dataset

    loaded = load_dataset("arrow", data_files=str(SHARD), split="train", cache_dir=str(tmp_path))
    assert loaded["completion_ids"][:] == COMPLETIONS


def test_polars_reads_a_shard() -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    assert polars.read_ipc(SHARD)["completion_ids"].to_list() == COMPLETIONS


@pytest.mark.slow
def test_duckdb_reads_a_shard() -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    shard = pa.ipc.open_file(SHARD).read_all()
    lengths = duckdb.from_arrow(shard).aggregate("role, sum(len(completion_ids))", "role").fetchall()
    assert dict(lengths) == {"chosen": 2, "rejected": 3, "desirable": 2}
