"""bco's density-ratio weights through the stages: they change the policy, and refuse data without any."""

import hashlib
import json
from pathlib import Path

import pytest

from cache.artifacts import open_artifact
from cache.errors import UsageError
from stages.data.rows import RowSet
from stages.train.step.density_ratio import DensityRatios
from tests.conftest import ANIMALS
from tests.pipeline.small_run import LN2, run, settings


def through_training(model: Path, data: Path, store: Path, loss: dict) -> tuple[dict, dict]:
    """Results of prepare and of train."""
    tree = settings(model, data, loss=loss, train={"batch_size": 8, "num_epochs": 1})
    return run(tree, store, "prepare"), run(tree, store, "cache-ref", "train")


@pytest.mark.slow
def test_udm_weights_unpaired_data(tiny_model, tmp_path) -> None:
    """Questions are mostly answered well and requests badly; at step 0 the loss of a row is its weight times ln 2."""
    rows = [
        {
            "prompt": f"{start} {animal}",
            "completion": f"The {animal} {number}.",
            "label": (number > 0) == good,
        }
        for start, good in (("Where is the", True), ("Tell me about a", False))
        for number, animal in enumerate(ANIMALS)
    ]
    data = tmp_path / "unpaired.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = {}
    for udm in (False, True):
        prepared, result = through_training(tiny_model, data, tmp_path / "store", {"name": "bco", "udm": udm})
        assert not result["reused"]
        model = Path(result["artifact"]) / "model.safetensors"
        weights[udm] = hashlib.sha256(model.read_bytes()).hexdigest(), result["step0"]["loss"]
    assert weights[False][0] != weights[True][0]
    train, heldout = (
        RowSet.of(open_artifact(Path(prepared["artifact"])), split) for split in ("train", "heldout")
    )
    ratios = DensityRatios(train).of(heldout)[heldout.roles != "mismatched"]
    assert len(set(ratios.tolist())) > 1
    assert weights[False][1] == pytest.approx(LN2, rel=1e-6)
    assert weights[True][1] == pytest.approx(LN2 * ratios.mean(), rel=1e-6)


@pytest.mark.slow
def test_udm_refuses_pairs(tiny_model, preferences, tmp_path) -> None:
    with pytest.raises(
        UsageError, match=r"Loss bco with udm .*same prompts. Leave udm out, or use unpaired data"
    ):
        through_training(tiny_model, preferences, tmp_path / "store", {"name": "bco", "udm": True})
