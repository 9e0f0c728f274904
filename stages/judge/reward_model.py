"""A judge that is a reward model: a sequence classifier with one output, which scores a conversation.

The conversation is rendered with the model's own chat template, or, where an encoder has none, given as the pair of texts
(prompt, completion). Rows are sorted by length and padded on the right with the id that the model itself takes for padding.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cache.errors import DataError
from cache.safetensors import weights_fingerprint
from stages.generation.completion_files import instruction
from stages.judge.contract import Answer, Keep, Question
from stages.models.fit import num_positions
from stages.models.identity import architecture
from stages.models.loading import ModelSource, first_line, load_tokenizer, load_weights, open_config
from stages.models.vocabulary import tokenizer_sha256
from stages.runtime.compute import Compute
from stages.runtime.limits import using_memory

# How far the score of a row alone and in a batch may differ by rounding, in the unit of the score, or relative to it.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Row = dict[str, list[int]]


@dataclass(frozen=True)
class RewardModelJudge:
    """Scores each completion with a reward model, in `compute.dtype`."""

    source: ModelSource
    compute: Compute
    log: Callable[[str], None]
    compares: bool = False

    @classmethod
    def of(cls, source: ModelSource, compute: Compute, log: Callable[[str], None]) -> "RewardModelJudge":
        """The judge of a model folder; raises `DataError` if it has not one output, or no way to read a conversation."""
        config = open_config(source)
        if config.num_labels != 1:
            raise DataError(
                f"{source.name} has {config.num_labels} outputs ({', '.join(map(str, config.architectures or []))}); judge.reward_model needs a sequence classifier with one, the score."
            )
        judge = cls(source, compute, log)
        if not judge._is_chat and not judge.tokenizer.sep_token:
            raise DataError(
                f"The tokenizer of {source.name} has no chat template, by which its reward model would read a conversation. Put the template that it was trained with there."
            )
        return judge

    @property
    def name(self) -> str:
        """The last part of the model's name."""
        return self.source.short_name

    @cached_property
    def tokenizer(self) -> Any:
        """The reward model's own tokenizer."""
        return load_tokenizer(self.source)

    @property
    def _is_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Weights, architecture, tokenizer and template, the id it takes for padding, and the dtype."""
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return {
            "kind": "reward_model",
            "weights": weights_fingerprint(self.source.folder),
            "architecture": architecture(self.source),
            "tokenizer": tokenizer_sha256(self.tokenizer),
            "chat_template": template if self._is_chat else None,
            "pad_token_id": open_config(self.source).get_text_config().pad_token_id,
            "dtype": self.compute.dtype_name,
        }

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Score every text; one that the template refuses, or that is too long for the model, has a problem instead."""
        limit = num_positions(self.source)
        rows: dict[int, Row] = {}
        for place, question in enumerate(questions):
            row, problem = self._row(question)
            if row and limit is not None and len(row["input_ids"]) > limit:
                problem = f"the conversation has {len(row['input_ids'])} tokens, and {self.name} has {limit} positions"
            if row is None or problem:
                keep([(place, Answer(None, problem))])
            else:
                rows[place] = row
        advice = f"Lower compute.tokens_per_batch (now {self.compute.tokens_per_batch})."
        with using_memory(advice), torch.inference_mode():
            for places, scores in self._scored(rows) if rows else ():
                keep([(place, Answer(score)) for place, score in zip(places, scores, strict=True)])

    def _row(self, question: Question) -> tuple[Row | None, str | None]:
        """The token ids of a conversation, or why the template refuses it."""
        [completion] = question.texts
        if not self._is_chat:
            return dict(self.tokenizer(instruction(question.prompt), completion)), None
        prompt = question.prompt
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [*turns, {"role": "assistant", "content": completion}]
        try:
            ids = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        except Exception as error:  # whatever a template raises
            return None, f"the chat template of {self.name} refuses the conversation: {first_line(error)}"
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}, None

    def _scored(self, rows: dict[int, Row]) -> Iterator[tuple[list[int], list[float]]]:
        """The scores of batches of rows, shortest first."""
        model = load_weights(self.source, self.compute.dtype, "AutoModelForSequenceClassification")
        model = model.to(self.compute.device).eval()
        padding = _padding(model, rows.values())
        by_length = sorted(rows, key=lambda place: len(rows[place]["input_ids"]))
        alone = not self._batches_agree(model, rows[by_length[0]], rows[by_length[-1]], padding)
        for places in self._batches(rows, by_length, alone):
            yield places, _scores(model, [rows[place] for place in places], padding)

    def _batches(self, rows: dict[int, Row], by_length: Sequence[int], alone: bool) -> Iterator[list[int]]:
        batch: list[int] = []
        for place in by_length:
            padded = len(rows[place]["input_ids"]) * (len(batch) + 1)
            if batch and (alone or padded > self.compute.tokens_per_batch):
                yield batch
                batch = []
            batch.append(place)
        yield batch

    def _batches_agree(self, model: Any, shortest: Row, longest: Row, padding: int) -> bool:
        """Whether a row has the same score alone and padded in a batch; models differ in which token they read it from."""
        [alone] = _scores(model, [shortest], padding)
        padded = _scores(model, [shortest, longest], padding)[0]
        agree = abs(alone - padded) <= TOLERANCE[self.compute.dtype] * max(1.0, abs(alone))
        if not agree:
            self.log(
                f"{self.name} scores a row {alone:.4g} alone and {padded:.4g} beside a longer one, so rows are scored one at a time"
            )
        return agree


def _padding(model: Any, rows: Any) -> int:
    """The id that the model takes for padding. Without one it refuses batches, so it is given one that no row has."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        used = {token for row in rows for token in row["input_ids"]}
        # All ids in use: any id will do then for rows that are scored one at a time, which is found out.
        config.pad_token_id = next((token for token in range(config.vocab_size) if token not in used), 0)
    return config.pad_token_id


def _scores(model: Any, rows: Sequence[Row], padding: int) -> list[float]:
    """The model's output for each row, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    inputs = {
        name: torch.tensor(
            [
                [*row[name], *[padding if name == "input_ids" else 0] * (width - len(row[name]))]
                for row in rows
            ],
            device=model.device,
        )
        for name in rows[0]
    }
    return model(**inputs).logits[:, 0].float().tolist()
