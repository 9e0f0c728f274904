"""What `align merge` refuses before it loads a model; the rest is in tests/pipeline/test_adapters.py."""

import json
import shutil

import pytest
import torch

from cache.artifacts import Artifact
from cache.errors import DataError
from stages.merge import merge
from stages.models.loading import ModelSource
from stages.runtime.compute import Compute

COMPUTE = Compute(torch.device("cpu"), torch.float32, 2048)


def test_a_base_that_cannot_be_saved_is_refused_before_it_is_merged(tiny_model, context, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.3}))
    policy = Artifact(tmp_path / "policy", {"files": [], "stage": "train", "fingerprint": "0" * 64})
    with pytest.raises(DataError, match=r"generation_config\.json cannot be saved with a trained model"):
        merge(policy, ModelSource("base", base), policy, COMPUTE, context)
    assert not context.store.root.exists()
