"""From preferences to token ids and the mask of what is trained, with one tokenizer and one template.

`render.py` makes the text, of which the prompt is a prefix; `encode.py` makes ids of it.
"""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.data.messages import Message
from stages.data.source_row import BadRow
from stages.formats.contract import Candidate, Preference, Tokens
from stages.tokenization.encode import NO_PROMPT, Encoded, Encoder, Plan, Tokenized
from stages.tokenization.render import Rendered, Turns

RENDER_VERSION = 4
# A tokenizer that has ids for these has them for every character (they take bytes of two, three and four).
RARE_CHARACTERS = "é東🦊"


class Template:
    """Renders and tokenizes preferences with one tokenizer."""

    def __init__(self, tokenizer: Any, choice: str, append_eos: bool, quick: bool = False) -> None:
        """Use `tokenizer` (a fast Hugging Face tokenizer) and the template that `choice` names.

        `choice` is as `prepare.template`; `quick` lets fastokens encode. Raises `DataError` when it cannot be had.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json). Convert it with transformers."
            )
        self._turns = Turns(tokenizer, choice, append_eos)
        if append_eos and tokenizer.eos_token is None:
            raise DataError(
                f"{tokenizer.name_or_path} has no end-of-sequence token. Use --set prepare.append_eos=false."
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.uses_chat = self._turns.uses_chat
        self._source = self._turns.chat.source
        self._encoder = Encoder(tokenizer.backend_tokenizer, quick)
        self._lost: dict[str, bool] = {}
        self._knows_every_character = not self._loses(RARE_CHARACTERS)

    def notes(self) -> list[str]:
        """What a person should know of the template with this tokenizer, one line each."""
        return self._turns.notes()

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What changes the token ids: tokenizer, template, rules of rendering and encoding."""
        return {
            "render_version": RENDER_VERSION,
            "tokenizer": self._tokenizer_sha256,
            "special_tokens": json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            "template": hashlib.sha256(str(self._source).encode()).hexdigest(),
            "append_eos": self.append_eos,
        }

    def render(self, preference: Preference) -> Rendered:
        """Text of a preference; raises `BadRow` when the template fails or rewrites the prompt."""
        return self._turns.render(preference)

    def watched(self) -> AbstractContextManager[None]:
        """Have one timer for all renderings inside (`ChatTemplate.watched`)."""
        return self._turns.chat.watched()

    def prompt_text(self, prompt: str | list[Message], tools: list[Any] | None = None) -> tuple[str, bool]:
        """A prompt alone, ready to be continued, and whether it is plain text."""
        rendered = self.render(Preference(prompt, [], tools))
        if rendered.breaker:
            raise BadRow("the text spells a special token, with which a prompt could forge a turn")
        return rendered.prompt, rendered.plain

    def encode(self, batch: list[Rendered]) -> list[Encoded | BadRow]:
        """Token ids of rendered preferences, tokenized together in Rust threads: all three steps."""
        plan = self.plan(batch)
        return self.finish(batch, plan, self.tokenize(plan))

    def plan(self, batch: list[Rendered]) -> Plan:
        """Which texts are tokenized."""
        return self._encoder.plan([item for item in batch if item.ready is None])

    def tokenize(self, plan: Plan) -> Tokenized:
        """The tokenizer's part, which can run beside Python in a thread."""
        return self._encoder.tokenize(plan.texts)

    def finish(self, batch: list[Rendered], plan: Plan, tokenized: Tokenized) -> list[Encoded | BadRow]:
        """What the tokenizer found, put together."""
        encoded = iter(self._encoder.finish(plan, tokenized))
        return [
            self._with_losses(item, next(encoded)) if item.ready is None else self._checked(item.ready)
            for item in batch
        ]

    def encode_prompts(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        """Token ids of prompts alone."""
        return self._encoder.encode_texts(texts, plain)

    def turn_end_ids(self) -> list[int]:
        """Ids that end a completion: end of sequence, and the special token that closes a turn."""
        ends = {self.tokenizer.eos_token_id}
        if self.uses_chat:
            turn = [{"role": "user", "content": "a"}]
            parts = self.render(Preference(turn, [Candidate("b", "chosen")])).completions[0]
            ends.add(self._encoder.encode_texts([parts[-1].text], [False])[0][-1])
        return sorted(end for end in ends if end is not None)

    def _with_losses(self, item: Rendered, encoded: Encoded | BadRow) -> Encoded | BadRow:
        """Say whether the tokenizer has no ids for some character of the row."""
        if self._knows_every_character or isinstance(encoded, BadRow):
            return encoded
        text = item.prompt + "".join(part.text for parts in item.completions for part in parts)
        text = text.replace(item.breaker, "") if item.breaker else text
        return replace(encoded, loses_text=self._loses(text))

    def _loses(self, text: str) -> bool:
        """Whether the tokenizer has no ids for some character of a text, or only that of the unknown."""
        backend, unknown = self.tokenizer.backend_tokenizer, self.tokenizer.unk_token_id
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        for character in set(text) - self._lost.keys():
            ids = backend.encode(f"a{character}a", add_special_tokens=False).ids
            plain = backend.encode("aa", add_special_tokens=False).ids
            self._lost[character] = ids == plain or (unknown in ids and unknown not in plain)
        return any(self._lost[character] for character in set(text))

    def _checked(self, preference: Preference) -> Encoded | BadRow:
        """The ids of a row that brought them, checked against the vocabulary."""
        tokens = [preference.prompt, *(candidate.completion for candidate in preference.candidates)]
        sides = [side for side in tokens if isinstance(side, Tokens)]
        largest = max((max(side.ids, default=0) for side in sides), default=0)
        if largest >= len(self.tokenizer):
            return BadRow(f"token id {largest}: the tokenizer has {len(self.tokenizer):,} ids")
        if not sides[0].ids:
            return BadRow(NO_PROMPT)
        completions = [
            (
                np.array(side.ids, dtype=np.int32),
                np.array(side.mask or [True] * len(side.ids), dtype=bool),
            )
            for side in sides[1:]
        ]
        return Encoded(np.array(sides[0].ids, dtype=np.int32), completions, 0)
