"""A judge that needs no other model: the implicit reward of a policy, beta * log(policy / reference) of a completion.

Of a policy trained with DPO this is the reward that it has learned (arXiv 2305.18290, equation 5, but for a term of the
prompt alone, which is the same for all completions of a prompt). Scored as `cache-ref` and `train` do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from stages.data.rows import Example, Row, RowSet, to_table
from stages.data.source_row import BadRow
from stages.engine.row_logps import score_groups
from stages.formats.contract import Candidate, Preference
from stages.judge.contract import Answer, Keep, Question
from stages.models.adapters import base_of, is_adapter, load_any
from stages.models.fit import num_positions
from stages.models.identity import model_identity
from stages.models.loading import ModelSource
from stages.models.vocabulary import TokensInUse
from stages.runtime.compute import SCORER_VERSION, Compute
from stages.runtime.limits import using_memory
from stages.tokenization.encode import Encoded
from stages.tokenization.template import Template


@dataclass(frozen=True)
class ImplicitJudge:
    """Scores each completion by two models; `template` makes its tokens, the end of its turn included."""

    policy: ModelSource
    reference: ModelSource
    beta: float
    template: Template
    compute: Compute
    log: Callable[[str], None]
    compares: bool = False

    @property
    def name(self) -> str:
        """The policy's name."""
        return f"implicit-{self.policy.short_name}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Both models, beta, and what makes and scores the tokens."""
        return {
            "kind": "implicit",
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "beta": self.beta,
            "template": self.template.identity(),
            "dtype": self.compute.arithmetic,
            "scorer_version": SCORER_VERSION,
        }

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Score every text; one that cannot be tokenized, or is too long for a model, has a problem instead."""
        examples: dict[int, Example] = {}
        for place, encoded in enumerate(self._encoded(questions)):
            if isinstance(encoded, str):
                keep([(place, Answer(None, encoded))])
            else:
                [(ids, mask)] = encoded.completions
                examples[place] = Example(
                    str(place), str(place), encoded.prompt_ids, [Row("ranked", ids, mask)]
                )
        if not examples:
            return
        rows = RowSet([to_table(list(examples.values()), range(len(examples)))])
        rewards = self.beta * (self._logps(self.policy, rows) - self._logps(self.reference, rows))
        keep([(place, Answer(float(reward))) for place, reward in zip(examples, rewards, strict=True)])

    def _encoded(self, questions: Sequence[Question]) -> list[Encoded | str]:
        """The tokens of each prompt and completion, or why there are none."""
        found: list[Encoded | str] = []
        limit = min(filter(None, map(_positions, (self.policy, self.reference))), default=None)
        with self.template.renderer.chat.guarded():
            for question in questions:
                try:
                    encoded = self._encode(question)
                except BadRow as problem:
                    found.append(str(problem))
                    continue
                length = len(encoded.prompt_ids) + len(encoded.completions[0][0])
                too_long = limit is not None and length > limit
                found.append(
                    f"it has {length} tokens, and the models have {limit} positions" if too_long else encoded
                )
        return found

    def _encode(self, question: Question) -> Encoded:
        [text] = question.texts
        is_text = isinstance(question.prompt, str)
        completion = text if is_text else [{"role": "assistant", "content": text}]
        rendered = self.template.renderer.render(
            Preference(question.prompt, [Candidate(completion, "ranked")])
        )
        batch = self.template.encoder.texts_of([rendered])
        [encoded] = self.template.encoder.encoded(batch, self.template.encoder.tokenize(batch.texts))
        if isinstance(encoded, BadRow):
            raise encoded
        if not encoded.completions[0][1].any():
            raise BadRow("the completion has no tokens")
        return encoded

    def _logps(self, source: ModelSource, rows: RowSet) -> np.ndarray:
        """The summed log-prob of each row's completion, float64, nats, shape (rows,)."""
        from stages.engine.scorer import Scorer  # imports transformers' modelling code

        used = TokensInUse(self.template.tokenizer, lambda: rows.token_ids())
        used.check(source, "The model", "Name one with the vocabulary of the policy.", self.log)
        advice = f"Lower compute.tokens_per_batch (now {self.compute.tokens_per_batch})."
        with using_memory(advice), torch.inference_mode():
            scorer = Scorer(load_any(source, self.compute), self.compute, self.log)
            found, _ = score_groups(scorer, rows, [np.array([row]) for row in range(len(rows))])
        return np.array([found[row][rows.mask(row) == 1].sum(dtype=np.float64) for row in range(len(rows))])


def _positions(source: ModelSource) -> int | None:
    return num_positions(base_of(source) if is_adapter(source.folder) else source)
