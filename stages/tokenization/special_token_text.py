"""Text of a row that spells a special token: it stays text, so that data cannot forge turns.

Before rendering, a character that no text holds goes into each such spelling, so that afterwards the template's
own special tokens are told from the row's. Then what lies between the template's is encoded without regard
to special tokens, and the ids are kept only where they provably say the text: they decode to it, and special
ids stand at the template's tokens alone. Rows that spell none never come here.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from stages.data.source_row import Flagged
from stages.formats.contract import Preference

# Noncharacters of Unicode, which no text is meant to hold.
BREAKERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
REASON = "spells_special_token"


def broken(preference: Preference, text: str, asked: list[str], spoken: list[str]) -> tuple[Preference, str]:
    """The preference with its spellings broken, and the character that breaks them.

    `text` is all of its text; `asked` are the special tokens to look for in the prompt and the tools,
    `spoken` those to look for in completions.
    """
    breaker = next((character for character in BREAKERS if character not in text), None)
    if breaker is None:
        raise unsure()
    candidates = [
        replace(candidate, completion=_broken(candidate.completion, spoken, breaker))
        for candidate in preference.candidates
    ]
    prompt, tools = (_broken(value, asked, breaker) for value in (preference.prompt, preference.tools))
    return replace(preference, prompt=prompt, tools=tools, candidates=candidates), breaker


def _broken(value: Any, tokens: list[str], breaker: str) -> Any:
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, token[0] + breaker + token[1:])
        return value
    if isinstance(value, dict):
        return {_broken(k, tokens, breaker): _broken(part, tokens, breaker) for k, part in value.items()}
    if isinstance(value, list):
        return [_broken(part, tokens, breaker) for part in value]
    return value


def unsure() -> Flagged:
    """The reason to drop a row whose spelling cannot be kept as text."""
    return Flagged(
        REASON, "the text spells a special token, which this tokenizer cannot encode as text with certainty"
    )


class SpelledText:
    """Encodes texts with broken spellings, with one tokenizer."""

    def __init__(self, backend: Any) -> None:
        """Use a copy of `backend`, a `tokenizers.Tokenizer`."""
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        contents = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, contents)) or '(?!)'})")
        self._takes_spaces = any(
            token.lstrip or token.rstrip or token.single_word for token in added.values()
        )

    def encode(self, text: str, breaker: str) -> np.ndarray:
        """Ids of a text, int32, without what the tokenizer puts around one; raises `Flagged` where they might not say it."""
        ids, special = [], []
        for number, piece in enumerate(self._split.split(text)):
            if number % 2:
                special.append(len(ids))
                ids.append(self._special[piece])
            elif piece:
                ids += self._backend.encode(piece.replace(breaker, ""), add_special_tokens=False).ids
        known = set(self._special.values())
        if (
            self._takes_spaces
            or [place for place, token in enumerate(ids) if token in known] != special
            or self._backend.decode(ids, skip_special_tokens=False) != text.replace(breaker, "")
        ):
            raise unsure()
        return np.array(ids, dtype=np.int32)
