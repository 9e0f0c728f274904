"""cache-ref by one process, by several ranks and by independent jobs: the same bytes."""

from pathlib import Path

import pytest

from stages.cache_ref import work_units
from tests.forked import on_two_ranks
from tests.pipeline.small_run import run, session, settings


def scored_by(tree: dict, store: Path, *shards: str | None) -> tuple[list[str], list[int]]:
    """Names (sha256) of the shards that these jobs leave, and how many rows each scored."""
    session(tree, store).run("prepare")
    results = [session(tree, store).run("cache-ref", shard=shard) for shard in shards]
    names = sorted(path.name for path in (store / "ref-logps").glob("*/*.arrow"))
    return names, [result["rows_scored"] for result in results]


@pytest.mark.slow
def test_independent_jobs_write_the_bytes_of_one(tiny_model, preferences, tmp_path, monkeypatch):
    """Some rows are in several units: the preferences are given twice, with the second half reversed."""
    monkeypatch.setattr(work_units, "UNIT_EXAMPLES", 5)
    lines = preferences.read_text().splitlines()
    preferences.write_text("\n".join([*lines, *reversed(lines)]) + "\n")
    tree = settings(tiny_model, preferences)
    alone, (total,) = scored_by(tree, tmp_path / "one", None)
    assert len(alone) > 3
    split, scored = scored_by(tree, tmp_path / "three", "3/3", "1/3", "2/3")
    assert split == alone
    assert sum(scored) == total
    assert min(scored) > 0
    assert scored_by(tree, tmp_path / "three", "2/3", None)[1] == [0, 0]


@pytest.mark.slow
def test_ranks_write_the_bytes_of_one(tiny_model, preferences, tmp_path):
    tree, store = settings(tiny_model, preferences), tmp_path / "two"
    alone, _ = scored_by(tree, tmp_path / "one", None)
    session(tree, store).run("prepare")
    errors = tmp_path / "errors.txt"
    assert on_two_ranks(lambda: run(tree, store, "cache-ref"), errors) == [0, 0], errors.read_text()
    assert sorted(path.name for path in (store / "ref-logps").glob("*/*.arrow")) == alone
