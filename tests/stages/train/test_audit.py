"""The audit at the start of training, against stores whose digests are all right and whose numbers are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.artifacts import open_artifact
from cache.errors import CorruptError, StaleError
from cache.files import read_json
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.engine.row_logps import score_groups
from stages.engine.scorer import Scorer
from stages.models.loading import load_model, resolve_model
from stages.runtime.compute import Compute
from stages.train.audit import _examples, audit
from tests.conftest import save_tiny_llama
from tests.pipeline.small_run import run, settings

pytestmark = pytest.mark.slow

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 2048)
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16, 2048)


class World:
    """Rows, their log-probs by the reference, and that reference, which is the policy before training."""

    def __init__(self, model: Path, rows: RowSet, reference: RefLogps) -> None:
        self.rows, self.reference = rows, reference
        self.scorer = Scorer(load_model(resolve_model(str(model), None), FLOAT32), FLOAT32, lambda _: None)
        self.values = {key: reference.get(key).copy() for key in dict.fromkeys(rows.keys)}

    def stored(self, values: dict[bytes, np.ndarray], folder: Path) -> RefLogps:
        """A store of the same reference with these values, in shards whose digests fit."""
        store = RefLogps(folder, self.reference.identity)
        store.add(list(values), list(values.values()))
        return RefLogps(folder, self.reference.identity)

    def scored_by(self, model: Path, compute: Compute) -> dict[bytes, np.ndarray]:
        """What another reference gives the rows."""
        scorer = Scorer(load_model(resolve_model(str(model), None), compute), compute, lambda _: None)
        groups = [np.arange(begin, end) for begin, end in zip(self.rows.starts, self.rows.ends, strict=True)]
        with torch.inference_mode():
            found, _ = score_groups(scorer, self.rows, groups)
        return {self.rows.keys[row]: np.minimum(values, 0) for row, values in found.items()}


@pytest.fixture(scope="module")
def world(tiny_model, shared_preferences, tmp_path_factory) -> World:
    store = tmp_path_factory.mktemp("audit")
    run(settings(tiny_model, shared_preferences), store, "prepare", "cache-ref")
    rows = next(path for path in (store / "rows").iterdir() if path.is_dir())
    folder = next(path for path in (store / "ref-logps").iterdir() if (path / "manifest.json").is_file())
    reference = RefLogps(folder, read_json(folder / "manifest.json")["identity"])
    return World(tiny_model, RowSet.of(open_artifact(rows), "train"), reference)


def test_the_reference_s_own_log_probs_pass(world, tmp_path):
    assert audit(world.scorer, world.rows, world.stored(world.values, tmp_path)).reference == 0


def another_revision(world: World, folder: Path) -> dict[bytes, np.ndarray]:
    """The same model after a few more steps: every weight one percent larger."""
    model = resolve_model(str(world.scorer.model.name_or_path), None)
    changed = Path(shutil.copytree(model.folder, folder / "revision"))
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor * 1.01 for name, tensor in load_file(changed / "model.safetensors").items()}
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    return world.scored_by(changed, FLOAT32)


def another_model(world: World, folder: Path) -> dict[bytes, np.ndarray]:
    from tests.conftest import make_chat_tokenizer

    return world.scored_by(save_tiny_llama(folder / "model", make_chat_tokenizer(), seed=5), FLOAT32)


def another_dtype(world: World, folder: Path) -> dict[bytes, np.ndarray]:
    return world.scored_by(Path(world.scorer.model.name_or_path), BFLOAT16)


def swapped_shard(world: World, folder: Path) -> dict[bytes, np.ndarray]:
    """The rows of a shard have the values of others of their length."""
    by_length: dict[int, list[bytes]] = {}
    for key, values in world.values.items():
        by_length.setdefault(len(values), []).append(key)
    exchanged = {}
    for keys in by_length.values():
        exchanged |= {key: world.values[other] for key, other in zip(keys, keys[1:] + keys[:1], strict=True)}
    return exchanged


def one_value_off(world: World, folder: Path) -> dict[bytes, np.ndarray]:
    """By 0.01 nats, in one token of the longest completion."""
    row = world.rows.starts[_examples(world.rows)[0]]
    values = dict(world.values)
    changed = values[world.rows.keys[row]].copy()
    changed[1] -= np.float32(0.01)
    return {**values, world.rows.keys[row]: changed}


CASES = [another_revision, another_model, another_dtype, swapped_shard, one_value_off]


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_log_probs_that_are_not_the_reference_s_stop_before_the_first_step(
    change: Callable[[World, Path], dict], world, tmp_path
):
    store = world.stored(change(world, tmp_path), tmp_path / "store")
    with pytest.raises(
        CorruptError, match=r"completion token \d+: the cached reference log-prob is .*delete it"
    ) as caught:
        audit(world.scorer, world.rows, store)
    assert caught.value.exit_code == 5


def test_rows_of_another_template_have_no_log_probs(world, tmp_path):
    """Other token ids are other keys, so the audit is not what stops them."""
    other = [bytes(16) for _ in world.rows.keys]
    with pytest.raises(StaleError, match="missing for"):
        world.reference.require(other, "align cache-ref")


def test_a_value_in_a_row_that_is_not_audited_is_not_found_here(world, tmp_path):
    """What the audit does not promise: it reads a few rows. `align verify --rescore` reads as many as it is told."""
    audited = {
        world.rows.keys[row]
        for example in _examples(world.rows)
        for row in range(world.rows.starts[example], world.rows.ends[example])
    }
    key = next(key for key in world.values if key not in audited)
    values = {**world.values, key: world.values[key] - np.float32(0.01)}
    assert audit(world.scorer, world.rows, world.stored(values, tmp_path)).reference == 0
