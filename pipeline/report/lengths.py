"""How long prompts and completions of a rows artifact are, in tokens."""

import numpy as np

from cache.artifacts import open_artifact
from pipeline.catalogue.entries import Entry
from pipeline.inspect.overview import Histogram
from stages.data.rows import SPLITS

PARTS = {"prompt": "prompt_ids", "completion": "completion_ids"}


def histograms(rows: Entry) -> list[Histogram]:
    """Of prompts and of completions, over training and held-out rows."""
    artifact = open_artifact(rows.path)
    shards = [shard for split in SPLITS for shard in artifact.shards(f"{split}-")]
    found = []
    for name, column in PARTS.items():
        lengths = [shard.column(column).combine_chunks().value_lengths().to_numpy() for shard in shards]
        joined = np.concatenate(lengths) if lengths else np.zeros(0)
        if joined.size:
            found.append(Histogram.of(name, joined))
    return found
