"""The text of single tokens, as a person can read it: what shares a character stays together, nothing is invisible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Texts of one token may end inside a character; this many tokens are enough for any.
MAX_TOKENS_OF_A_CHARACTER = 8
INVISIBLE = {0x7F: "␡", **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}}


@dataclass(frozen=True)
class Token:
    """One token, or the few that make one character; `text` holds nothing a terminal would obey."""

    text: str
    ids: tuple[int, ...]
    is_special: bool


class TokenTexts:
    """Decodes ids one by one with a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Special are the tokenizer's own special tokens and those added as such."""
        self._decode = tokenizer.backend_tokenizer.decode
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def of(self, ids: Sequence[int]) -> list[Token]:
        """Tokens whose texts together are the decoded text."""
        found: list[Token] = []
        before: list[int] = []
        group: list[int] = []
        for place, number in enumerate(ids):
            group.append(number)
            # Some decoders drop a leading blank, so that a text is what a token adds to the one before it.
            known = self._decode(before, skip_special_tokens=False) if before else ""
            text = self._decode(before + group, skip_special_tokens=False)[len(known) :]
            is_open = text.endswith("\ufffd") and len(group) < MAX_TOKENS_OF_A_CHARACTER
            if is_open and place + 1 < len(ids):
                continue
            found.append(Token(_visible(text), tuple(group), number in self._special))
            before, group = group, []
        return found


def _visible(text: str) -> str:
    """Text with every character that has no picture of its own replaced by one that has."""
    return "".join(
        letter
        if letter in "\n\t" or letter.isprintable()
        else INVISIBLE.get(ord(letter), f"⟨U+{ord(letter):04X}⟩")
        for letter in text
    )
