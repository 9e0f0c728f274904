"""Characters that a tokenizer has no ids for: it leaves them out, or gives them the id of the unknown token."""

from typing import Any

from stages.tokenization.render import Rendered

# A tokenizer that has ids for these (two, three and four bytes in UTF-8) has ids for every character.
RARE_CHARACTERS = "é東🦊"


class LostCharacters:
    """Finds such characters, with one tokenizer; each character is encoded once and remembered."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer."""
        self._tokenizer = tokenizer
        self._is_lost: dict[str, bool] = {}
        self._loses_none = not self._any_of(RARE_CHARACTERS)

    def any_in(self, rendered: Rendered) -> bool:
        """Whether the text holds a character without ids; special tokens do not count."""
        return not self._loses_none and self._any_of(rendered.text)

    def _any_of(self, text: str) -> bool:
        backend, unknown = self._tokenizer.backend_tokenizer, self._tokenizer.unk_token_id
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, "")
        for character in set(text) - self._is_lost.keys():
            ids = backend.encode(f"a{character}a", add_special_tokens=False).ids
            without = backend.encode("aa", add_special_tokens=False).ids
            self._is_lost[character] = ids == without or (unknown in ids and unknown not in without)
        return any(self._is_lost[character] for character in set(text))
