"""Real models against float64 log-probs computed elsewhere."""

import json

import numpy as np
import pytest
import torch

from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine.packs import build_pack
from stages.engine.scorer import Scorer
from stages.models.loading import load_model, load_tokenizer, resolve_model
from stages.runtime.compute import Compute


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K-hf-hd32", "babyllama105-hf-hd32"])
def test_stories_have_the_published_log_probs(name: str, shared_data) -> None:
    golden = json.loads((shared_data / "reference" / "tinystories_golden.json").read_text())["models"][name]
    text = (shared_data / "eval" / "tinystories_sample.txt").read_text()
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    source = resolve_model(str(shared_data / "models" / name), None)
    model = load_model(source, Compute(torch.device("cpu"), torch.float32, 4096))
    tokenizer, limit = load_tokenizer(source), model.config.max_position_embeddings
    examples = []
    for number, story in enumerate(stories):
        ids = np.array(tokenizer(story).input_ids[:limit], dtype=np.int32)
        examples.append(
            Example(str(number), name, ids[:1], [Row("ranked", ids[1:], np.ones(len(ids) - 1, bool))])
        )
    rows = RowSet([to_table(examples, [0] * len(examples))])
    scorer = Scorer(model, Compute(torch.device("cpu"), torch.float32, 4096), print)
    pack = build_pack(rows, [np.array([row]) for row in range(len(rows))])
    with torch.no_grad():
        pieces = scorer(pack).completion_logps.double().split(rows.completion_lengths.tolist())
    for piece, expected in zip(pieces, golden["stories"], strict=True):
        assert len(piece) == expected["tokens"]
        assert float(piece.sum()) == pytest.approx(expected["logp_sum"], abs=1e-3)
        assert piece[:4].tolist() == pytest.approx(expected["logp_first4"], abs=1e-5)
