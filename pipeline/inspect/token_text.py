"""Decodes single tokens to readable text: tokens that share a character stay together, control characters are visible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A character may span several tokens, but not more than this.
MAX_TOKENS_OF_A_CHARACTER = 8
INVISIBLE = {0x7F: "␡", **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}}


@dataclass(frozen=True)
class Token:
    """One token, or the few that make one character; `text` holds no control characters for a terminal."""

    text: str
    ids: tuple[int, ...]
    is_special: bool


class TokenTexts:
    """Decodes token by token with a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Collect the special tokens: those of the vocabulary and those added as special."""
        self._decode = tokenizer.backend_tokenizer.decode
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def of(self, ids: Sequence[int]) -> list[Token]:
        """Tokens whose texts join to the decoded text of `ids`."""
        found: list[Token] = []
        before: list[int] = []
        group: list[int] = []
        for place, number in enumerate(ids):
            group.append(number)
            # Some decoders drop a leading blank, so decode with the token before and remove its text.
            known = self._decode(before, skip_special_tokens=False) if before else ""
            text = self._decode(before + group, skip_special_tokens=False)[len(known) :]
            is_open = text.endswith("\ufffd") and len(group) < MAX_TOKENS_OF_A_CHARACTER
            if is_open and place + 1 < len(ids):
                continue
            found.append(Token(_visible(text), tuple(group), number in self._special))
            before, group = group, []
        return found


def _visible(text: str) -> str:
    """Replace characters that are not printable by visible ones."""
    return "".join(
        letter
        if letter in "\n\t" or letter.isprintable()
        else INVISIBLE.get(ord(letter), f"⟨U+{ord(letter):04X}⟩")
        for letter in text
    )
