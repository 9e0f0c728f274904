"""Special tokens in the text of a row: they stay text, so that data cannot forge a turn.

Before rendering, a character that no text holds (the escape character) goes into each of them, so that the template's
own special tokens can be told from the row's. After rendering, the text between the template's is encoded with special
tokens switched off, and the row is used only if its ids are correct for certain: they decode to the text, and special ids
occur at the template's tokens only. Rows without a special token in their text need none of these steps.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from stages.data.source_row import Flagged
from stages.formats.contract import Preference

# Noncharacters of Unicode, which no text is meant to hold; `turn_places.py` marks turns with the last four.
ESCAPE_CHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDEC)))
# An assistant's own reasoning may be written into its content; these open no turn.
REASONING_MARKS = ("<think>", "</think>")


class SpecialTokenText:
    """Finds a tokenizer's special tokens and a template's marks in the text of a row, and escapes the special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a Hugging Face tokenizer."""
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first, because one can be part of another.
        self.tokens = sorted(
            added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token)
        )

    def escaped(self, preference: Preference, marks: Sequence[str]) -> tuple[Preference, str]:
        """The preference with the special tokens of its texts escaped, and the escape character ("" where there are none).

        `marks` are the special tokens and the template's marks to look for. Raises `Flagged` where a text holds a
        mark that the template writes with ordinary tokens: the two could not be told apart.
        """
        in_prompt, in_completions = _found(preference, marks)
        if not in_prompt and not in_completions:
            return preference, ""
        escape = ""
        if not set(self.tokens).isdisjoint(in_prompt + in_completions):
            preference, escape = self._escaped(preference)
            in_prompt, in_completions = _found(preference, marks)
        if forged := in_prompt + in_completions:
            kind = "special token" if forged[0] in self.tokens else "template's mark"
            raise Flagged(
                "spells_turn_mark",
                f"the text spells the {kind} {forged[0].strip()}, with which data could forge a turn",
            )
        return preference, escape

    def _escaped(self, preference: Preference) -> tuple[Preference, str]:
        text = "\0".join(_texts([preference.prompt, preference.tools, _completions(preference)]))
        escape = next((character for character in ESCAPE_CHARACTERS if character not in text), None)
        if escape is None:
            raise not_encodable()
        in_completions = [token for token in self.tokens if token not in REASONING_MARKS]
        candidates = [
            replace(candidate, completion=_escape(candidate.completion, in_completions, escape))
            for candidate in preference.candidates
        ]
        prompt, tools = (
            _escape(value, self.tokens, escape) for value in (preference.prompt, preference.tools)
        )
        return replace(preference, prompt=prompt, tools=tools, candidates=candidates), escape


def _found(preference: Preference, marks: Sequence[str]) -> tuple[list[str], list[str]]:
    """The marks in the prompt with its tools, and those in the completions."""
    # Joined by a character that no mark holds, so that each mark is searched for once.
    prompt = "\0".join(_texts([preference.prompt, preference.tools]))
    completions = "\0".join(_texts(_completions(preference)))
    signs = _signs(tuple(marks))
    return (
        [mark for mark in marks if mark in prompt] if any(map(prompt.__contains__, signs)) else [],
        [mark for mark in marks if mark in completions and mark not in REASONING_MARKS]
        if any(map(completions.__contains__, signs))
        else [],
    )


@lru_cache(maxsize=16)
def _signs(marks: tuple[str, ...]) -> tuple[str, ...]:
    """A few characters of which every mark has one, those first that texts seldom have; a text without them has no mark."""
    signs: list[str] = []
    for mark in marks:
        if mark and not any(sign in mark for sign in signs):
            signs.append(
                min(mark, key=lambda sign: (sign.isalnum() or sign.isspace(), sign in ".,:;'!?-", sign))
            )
    return tuple(signs)


def _completions(preference: Preference) -> list[Any]:
    return [candidate.completion for candidate in preference.candidates]


def _texts(value: Any) -> list[str]:
    """Every text inside a message, a list of messages, or a text; keys of objects too."""
    found: list[str] = []
    _collect(found, value)
    return found


def _collect(found: list[str], value: Any) -> None:
    if isinstance(value, str):
        found.append(value)
        return
    if isinstance(value, dict):
        found += value
        value = value.values()
    elif not isinstance(value, list):
        return
    for part in value:
        if type(part) is str:  # nearly all are, and a call for each would take most of the time
            found.append(part)
        else:
            _collect(found, part)


def _escape(value: Any, tokens: Sequence[str], escape: str) -> Any:
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, token[0] + escape + token[1:])
        return value
    if isinstance(value, dict):
        return {_escape(k, tokens, escape): _escape(part, tokens, escape) for k, part in value.items()}
    if isinstance(value, list):
        return [_escape(part, tokens, escape) for part in value]
    return value


def not_encodable() -> Flagged:
    """The reason to drop a row whose special tokens cannot be kept as text."""
    return Flagged(
        "spells_special_token",
        "the text spells a special token, which this tokenizer cannot encode as text with certainty",
    )


class EscapedTextEncoder:
    """Encodes texts whose special tokens are escaped, with one tokenizer."""

    def __init__(self, backend: Any) -> None:
        """Use a copy of `backend`, a `tokenizers.Tokenizer`."""
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        contents: list[str] = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, contents)) or '(?!)'})")
        self._takes_spaces = any(
            token.lstrip or token.rstrip or token.single_word for token in added.values()
        )

    def encode(self, text: str, escape: str) -> np.ndarray:
        """Ids of a text, int32, without the special tokens around it; raises `Flagged` where they are not correct for certain."""
        ids, special = [], []
        for number, piece in enumerate(self._split.split(text)):
            if number % 2:
                special.append(len(ids))
                ids.append(self._special[piece])
            elif piece:
                ids += self._backend.encode(piece.replace(escape, ""), add_special_tokens=False).ids
        known = set(self._special.values())
        if (
            self._takes_spaces
            or [place for place, token in enumerate(ids) if token in known] != special
            or self._backend.decode(ids, skip_special_tokens=False) != text.replace(escape, "")
        ):
            raise not_encodable()
        return np.array(ids, dtype=np.int32)
