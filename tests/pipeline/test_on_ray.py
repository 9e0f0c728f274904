"""`--on ray`: a local cluster makes the bytes of one process, also when a worker is killed at work."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from cache.artifacts import open_artifact
from cache.errors import MachineError, UsageError
from pipeline.commands.prepare import prepare
from pipeline.on_ray import cluster
from tests.pipeline.small_run import session, settings


def killed_once(inputs, **options):
    """prepare, of which the first share that is tried loses its process."""
    mark = inputs.context.store.root / "killed"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return prepare(inputs, **options)
    os.kill(os.getpid(), signal.SIGKILL)


def content(artifact: str) -> dict:
    manifest = open_artifact(Path(artifact)).manifest
    return {name: manifest[name] for name in ("identity", "counts", "files")}


def names(store: Path) -> list[str]:
    """The sha256 of every shard of log-probs."""
    return sorted(path.name for path in store.glob("ref-logps/*/*.arrow"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")
def test_tasks_make_the_bytes_of_one_process_though_a_worker_is_killed(tiny_model, preferences, tmp_path):
    tree = settings(tiny_model, preferences, train={"max_steps": 2})
    alone, store = tmp_path / "alone", tmp_path / "store"
    one = session(tree, alone).run("prepare")
    session(tree, alone).run("cache-ref")
    own = session(tree, store)
    store.mkdir()
    with cluster("ray") as tasks:
        count = tasks.num_tasks(on_gpus=False)
        shares = tasks.run_shares("prepare", killed_once, own.context, on_gpus=False)
    assert (store / "killed").exists()
    assert [share["shard"] for share in shares] == [f"{number}/{count}" for number in range(1, count + 1)]
    assert content(own.run("prepare", join=True)["artifact"]) == content(one["artifact"])
    scored = session(tree, store).run("cache-ref", on="ray")
    assert names(store) == names(alone)
    assert scored["rows_scored"] == scored["rows_needed"] > 0
    tree["sweep"] = {"keys": {"loss.beta": [0.1, 0.2]}}
    swept = session(tree, store).run("sweep", on="ray")
    assert len(list(store.glob("policy/*/manifest.json"))) == 2, swept


def test_what_on_takes(tiny_model, preferences, tmp_path, monkeypatch):
    own = session(settings(tiny_model, preferences), tmp_path)
    with pytest.raises(UsageError, match=r"--on slurm: expected ray or ray:ADDRESS"):
        own.run("prepare", on="slurm")
    for options in ({"shard": "1/2"}, {"join": True}):
        with pytest.raises(UsageError, match="--on makes the shares"):
            own.run("prepare", on="ray", **options)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MachineError, match=r"pip install -e '\.\[ray\]'"):
        own.run("prepare", on="ray")
