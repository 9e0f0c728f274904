"""Whether rows fit a model, and whether what comes out of training can be saved: known before weights are loaded.

In: a model's configuration files, and rows.  Out: nothing, or an `AlignError`.
"""

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from cache.errors import DataError, MachineError, UsageError
from stages.data.rows import RowSet
from stages.models.loading import ModelSource, load_tokenizer, open_config
from stages.runtime.limits import writing


def num_positions(source: ModelSource) -> int | None:
    """Tokens that a row may have, whatever its configuration calls it; None if the architecture sets no limit."""
    limit = getattr(open_config(source).get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_rows_fit(source: ModelSource, row_sets: Iterable[RowSet]) -> None:
    """Raise `UsageError` if a row is longer than the model's positions, or has an id that its embedding lacks."""
    limit = num_positions(source)
    vocabulary = getattr(open_config(source).get_text_config(), "vocab_size", None)
    for rows in row_sets:
        if limit is not None and rows.max_length() > limit:
            raise UsageError(
                f"The longest row has {rows.max_length()} tokens, and {source.folder.name} has {limit} positions. "
                f"Prepare again with --set prepare.max_length={limit}."
            )
        largest = int(max(rows.token_ids(), default=0))
        if isinstance(vocabulary, int) and largest >= vocabulary:
            row = next(
                row
                for row in range(len(rows))
                if largest in np.append(rows.prompt(row), rows.completion(row))
            )
            raise UsageError(
                f"Row {rows.keys[row].hex()} ({rows.sources[row]}) has token id {largest}, and the embedding of "
                f"{source.name} ends at {vocabulary - 1}: its tokenizer is larger than the model. Resize the model's "
                f"embedding (model.resize_token_embeddings), or remove the added tokens, and prepare again."
            )


def check_can_be_saved(source: ModelSource) -> None:
    """Raise `DataError` if configuration, generation configuration or tokenizer load but cannot be written.

    transformers checks more when it saves: without this the first checkpoint would end a training run.
    """
    from transformers import GenerationConfig

    config = open_config(source)
    # A full disk says nothing about the model: it is an error where the model is written.
    with (
        suppress(MachineError),
        tempfile.TemporaryDirectory(prefix="align-") as folder,
        writing(Path(folder)),
    ):
        what = "config.json"
        try:
            config.save_pretrained(folder)
            what = "generation_config.json"
            if (source.folder / what).is_file():
                GenerationConfig.from_pretrained(source.folder, local_files_only=True).save_pretrained(folder)
            else:
                what = "config.json"
                GenerationConfig.from_model_config(config).save_pretrained(folder)
            what = "the tokenizer"
            load_tokenizer(source).save_pretrained(folder)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{source.folder}: {what} cannot be saved with a trained model ({' '.join(str(error).split())[:300]}). Mend it there."
            ) from error
