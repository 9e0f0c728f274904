"""A first configuration for a model and a data file, guessed with the code that `align prepare` uses.

In: a model and a source of data.  Out: the rows that their first source rows become, the tokenizer, and the text of a commented YAML file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cache.artifacts import Artifact, Store
from pipeline import yaml_1_2
from pipeline.config import build_config
from pipeline.config_sources import EMBEDDED
from pipeline.inputs import Inputs
from pipeline.inspect.prepared_rows import PreparedRows
from stages.data.readers import read_source
from stages.formats import FORMATS
from stages.formats.guessed_columns import as_yaml, guessed_columns
from stages.losses import LOSSES
from stages.models.fit import num_positions
from stages.prepare.stage import prepare
from stages.runtime.context import Context
from stages.settings.data import DataSettings, PrepareSettings

SAMPLE_ROWS = 64
# Long enough to see how long the rows are; nothing is computed on them.
NO_LIMIT = 1 << 20


@dataclass(frozen=True)
class Guess:
    """What the first source rows became, and what follows from it; `columns` is empty where a format has their names."""

    model: str
    data: str
    columns: Mapping[str, str]
    format: str
    template: str
    loss: str
    why: str
    rows_read: int
    longest: int
    max_length: int

    def yaml(self) -> str:
        """The configuration with a comment above each key that may have to change."""
        columns = next(format_.columns for format_ in FORMATS if format_.name == self.format)
        loss = LOSSES[self.loss]()
        return TEXT.format(
            data=_scalar(self.data),
            map=MAP.format(columns=as_yaml(self.columns)) if self.columns else "",
            format=self.format,
            columns=columns,
            model=_scalar(self.model),
            template=self.template,
            longest=self.longest,
            rows=self.rows_read,
            max_length=self.max_length,
            why=self.why,
            loss=self.loss,
            rate=f"{loss.learning_rate:g}".replace("e-0", "e-"),
            batch=loss.batch_size,
        )


TEXT = """\
# Made by `align init` from the first {rows:,} rows. Every other key, with its default and meaning: configs/reference.yaml.
data:
  path: {data}
{map}  # detected from the columns: {columns}
  format: {format}
policy:
  model: {model}
prepare:
  # chat: the chat template of the tokenizer; plain: prompt and completion joined as they are
  template: {template}
  # tokens of prompt and completion together; the longest of the rows read has {longest:,}
  max_length: {max_length}
  # share of the conversations that is kept for evaluation
  heldout_fraction: 0.05
loss:
  # {why}
  name: {loss}
train:
  # Every loss has a learning rate and a batch size of its own, for {loss} {rate} and {batch}. To set them for all losses:
  # learning_rate: {rate}
  # batch_size: {batch}
  num_epochs: 1
sample:
  # also sample from the reference, for `align judge` and `align compare`
  compare: true
"""
MAP = """\
  # guessed from the names of your columns, which stand on the right; check the rows that `align inspect` shows
  columns: {columns}
"""


@contextmanager
def guessed(model: str, data: str) -> Iterator[tuple[Guess, Artifact, Any]]:
    """Prepare the first rows in a temporary store, which is gone afterwards; raises `AlignError` as `align prepare` does."""
    columns = {} if data == EMBEDDED else _columns_of(data)
    tree = {
        "data": {"path": data, "max_samples": SAMPLE_ROWS, "columns": columns or None},
        "policy": {"model": model},
        "prepare": {"heldout_fraction": 0.0, "mismatched": False, "max_length": NO_LIMIT},
    }
    with TemporaryDirectory(prefix="align-init-") as store:
        inputs = Inputs(build_config(tree), Context(Store(Path(store))))
        template = inputs.template
        rows = PreparedRows(prepare(*inputs.rows_source), template.tokenizer)
        loss, why = _loss_for(rows.artifact.counts["rows_by_role"])
        guess = Guess(
            model,
            data,
            columns,
            rows.artifact.counts["format"],
            "chat" if template.renderer.uses_chat else "plain",
            loss,
            why,
            rows.artifact.counts["rows_in"],
            rows.max_tokens,
            min(PrepareSettings().max_length, num_positions(inputs.policy_source) or NO_LIMIT),
        )
        yield guess, rows.artifact, template.tokenizer


def _columns_of(data: str) -> dict[str, str]:
    """The column map that the first row needs; empty where a format matches one of the first rows."""
    head = [
        row.value
        for row in read_source(DataSettings(path=data, max_samples=SAMPLE_ROWS))
        if row.value is not None
    ]
    if not head or any(format_.matches(row) for row in head for format_ in FORMATS):
        return {}
    return guessed_columns(head[0])


def _loss_for(roles: Mapping[str, Any]) -> tuple[str, str]:
    if "rejected" in roles:
        return (
            "dpo",
            "pairs of a chosen and a rejected completion: ipo, simpo, orpo and most other losses read them too",
        )
    if "undesirable" in roles or "desirable" in roles:
        return "kto", "single completions that are good or bad: bco and apo_zero_unpaired read them too"
    return "sft", "completions without a rejected one"


def _scalar(text: str) -> str:
    return yaml_1_2.dump(text).removesuffix("...\n").strip()
