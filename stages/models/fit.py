"""Whether rows fit a model, and whether what comes out of training can be saved: known before weights are loaded.

In: a model's configuration files, and rows.  Out: nothing, or an `AlignError`.
"""

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

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
    config = open_config(source)
    parts = [
        ("config.json", config),
        _generation_config(source, config),
        ("the tokenizer", load_tokenizer(source)),
    ]
    # A full disk says nothing about the model: it is an error where the model is written.
    with (
        suppress(MachineError),
        tempfile.TemporaryDirectory(prefix="align-") as folder,
        writing(Path(folder)),
    ):
        for name, part in parts:
            try:
                part.save_pretrained(folder)
            except (ValueError, TypeError) as error:
                raise _unsavable(source, name, error) from error


def _generation_config(source: ModelSource, config: Any) -> tuple[str, Any]:
    """The generation configuration that transformers would save with the model, and the file that it comes from."""
    from transformers import GenerationConfig

    name = "generation_config.json"
    if not (source.folder / name).is_file():
        return "config.json", GenerationConfig.from_model_config(config)
    try:
        return name, GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise _unsavable(source, name, error) from error


def _unsavable(source: ModelSource, name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300]
    return DataError(
        f"{source.folder}: {name} cannot be saved with a trained model ({reason}). Fix the file there."
    )
