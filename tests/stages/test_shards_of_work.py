"""cache-ref by one process, by several ranks and by independent jobs: the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cache.errors import UsageError
from pipeline.config import build_config
from pipeline.run import Session
from stages import cache_ref as stage
from stages.cache_ref import Worker, choose_worker

ROOT = Path(__file__).resolve().parents[2]


def tree_of(model: Path, preferences: Path) -> dict:
    return {
        "data": {"path": str(preferences)},
        "policy": {"model": str(model)},
        "prepare": {"max_length": 128, "heldout_fraction": 0.25},
        "compute": {"dtype": "float32", "device": "cpu", "tokens_per_batch": 300},
    }


def scored_by(tree: dict, store: Path, *shards: str | None) -> tuple[list[str], list[int]]:
    """Names (sha256) of the shards that these jobs leave, and how many rows each scored."""
    Session(build_config(tree), store, say=[].append).run("prepare")
    results = [
        Session(build_config(tree), store, say=[].append, shard=shard).run("cache-ref") for shard in shards
    ]
    names = sorted(path.name for path in (store / "ref-logps").glob("*/*.arrow"))
    return names, [result["rows_scored"] for result in results]


def test_independent_jobs_write_the_bytes_of_one(tiny_model, preferences, tmp_path, monkeypatch):
    """Some rows are in several units: the preferences are given twice, with the second half reversed."""
    monkeypatch.setattr(stage, "UNIT_EXAMPLES", 5)
    lines = preferences.read_text().splitlines()
    preferences.write_text("\n".join([*lines, *reversed(lines)]) + "\n")
    tree = tree_of(tiny_model, preferences)
    alone, (total,) = scored_by(tree, tmp_path / "one", None)
    assert len(alone) > 3
    split, scored = scored_by(tree, tmp_path / "three", "3/3", "1/3", "2/3")
    assert split == alone
    assert sum(scored) == total
    assert min(scored) > 0
    assert scored_by(tree, tmp_path / "three", "2/3", None)[1] == [0, 0]


@pytest.mark.slow
def test_ranks_write_the_bytes_of_one(tiny_model, preferences, tmp_path):
    tree = tree_of(tiny_model, preferences)
    config, store = tmp_path / "run.yaml", tmp_path / "two"
    config.write_text(yaml.safe_dump(tree))
    alone, _ = scored_by(tree, tmp_path / "one", None)
    Session(build_config(tree), store, say=[].append).run("prepare")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "pipeline", "cache-ref", "-c", str(config), "--store", str(store)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (store / "ref-logps").glob("*/*.arrow")) == alone


def test_a_shard_is_named_from_1_to_n(monkeypatch):
    assert choose_worker("2/8") == Worker(1, 8)
    for wrong in ("0/8", "9/8", "8", "a/b", "-1/3", ""):
        with pytest.raises(UsageError, match=r"expected i/N"):
            choose_worker(wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert choose_worker(None) == Worker(1, 2)
    with pytest.raises(UsageError, match="under torchrun"):
        choose_worker("1/2")
