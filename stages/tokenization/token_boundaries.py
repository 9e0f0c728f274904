"""Whether two texts can be tokenized apart: encode(a + b) = encode(a) + encode(b), decided without encoding.

The answer is yes only where it follows from how the tokenizer works; everywhere else it is no, and the whole text is
tokenized. The argument: pre-tokenizers of the GPT family split a text by one regular expression. It is matched from left
to right, never looks behind its start, and looks past the end of a match by at most one character, a contraction
(`'re`: three characters) or the rest of a run of white space. So whether there is a split at the boundary of a and b is
decided by the text from the last safe split point in a to four characters into b, unless white space meets white
space at the boundary. The pre-tokenizer itself is run on that window. If it splits at the boundary, and left of it as it
does without b, then nothing on one side depends on the other, and subword models never merge across a split. Added tokens
are found before pre-tokenization, so a boundary inside one is refused, and the end of one is a safe split point.
"""

import json
import re
from functools import lru_cache
from typing import Any

# Characters behind a boundary that a match in front of it can read: a contraction.
REACH = 4
# Characters in front of a boundary in which a safe split point is looked for.
WINDOW = 64
# The expressions the argument was made for; other tokenizers always encode the whole text.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    # Llama 3, OLMo 2, Qwen 2 and 3, and similar ones: cl100k with numbers of up to three digits, two, or one.
    *(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACE}"
        for digits in ("{1,3}", "{1,2}", "")
    ),
    # o200k: GPT-OSS, Phi-4 and others.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    rf"{CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{SPACE}",
}
# Where every one of them splits, in any context: before a space that follows anything but white space, and
# between a line break and a letter or "<". At least REACH characters before the boundary.
LAST_SAFE_SPLIT = re.compile(rf"(?s).*(?:(?<=\S)(?= )|(?<=\n)(?=[<\w]))(?=.{{{REACH}}})")


class TokenBoundaries:
    """Answers for one tokenizer; `backend` is a `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any) -> None:
        """Analyse the parts of the tokenizer; `is_known`: whether any answer can be yes."""
        self._backend = backend
        added = list(backend.get_added_tokens_decoder().values())
        contents: list[str] = sorted((token.content for token in added), key=len, reverse=True)
        self._longest = max(map(len, contents), default=0)
        self._added = _any_of(contents)
        self._overlapping = _any_of(_overlapping(contents))
        # Last characters of the proper prefixes of added tokens: a boundary inside a token follows one of these.
        self._ends_of_prefixes = {content[end - 1] for content in contents for end in range(1, len(content))}
        self._normalizes = backend.normalizer is not None
        self.is_known = (
            _splits_left_to_right(backend.pre_tokenizer)
            and _normalizes_nothing_or_nfc(backend.normalizer)
            and not any(token.lstrip or token.rstrip or token.single_word for token in added)
            and not (self._normalizes and any(token.normalized for token in added))
        )
        self._pre_tokenizer_splits = lru_cache(maxsize=1 << 12)(self._run_pre_tokenizer)

    def tail(self, before: str) -> str | None:
        """The end of a text that decides what can follow it apart: from its last safe split point; None without one."""
        if not self.is_known:
            return None
        window = before[-(WINDOW + self._longest) :]
        if self._overlapping.search(window):
            return None  # the tokens found would depend on where the search begins
        end = 0
        for token in self._added.finditer(window):
            end = token.end()
        if end:
            rest = window[end:]
            return rest if len(rest) <= WINDOW else _from_last_safe_split(rest[-WINDOW:])
        return before if len(before) <= WINDOW else _from_last_safe_split(window[-WINDOW:])

    def can_split(self, tail: str | None, before: str, after: str) -> bool:
        """Whether `before` and `after` can be encoded apart; `tail` is that of `before`."""
        if not after:
            return True
        if tail is None or not before:
            return False
        head = after[:REACH]
        if self._normalizes and not head.isascii():
            return False
        if before[-1] in self._ends_of_prefixes and self._is_inside_an_added_token(before, after):
            return False
        if not tail:
            return True
        return not (tail[-1].isspace() and head[0].isspace()) and self._pre_tokenizer_splits(tail, head)

    def _is_inside_an_added_token(self, before: str, after: str) -> bool:
        reach = self._longest - 1
        left = before[-reach:]
        text = left + after[:reach]
        return any(
            token.end() > len(left)
            for start in range(len(left))
            if (token := self._added.match(text, start)) is not None
        )

    def _run_pre_tokenizer(self, tail: str, head: str) -> bool:
        pieces = self._pieces(tail)
        return self._pieces(tail + head)[: len(pieces)] == pieces

    def _pieces(self, text: str) -> list[str]:
        if self._normalizes:
            text = self._backend.normalizer.normalize_str(text)
        return [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]


def _from_last_safe_split(window: str) -> str | None:
    found = LAST_SAFE_SPLIT.match(window)
    return window[found.end() :] if found else None


def _splits_left_to_right(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer is one of the GPT family, and adds nothing to what it splits."""
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    has_pattern = False
    for part in parts:
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            has_pattern |= part["use_regex"]
        elif part["type"] == "Split" and part["pattern"].get("Regex") in PATTERNS:
            has_pattern |= (part["behavior"], part["invert"]) in (("Removed", True), ("Isolated", False))
        elif not (part["type"] == "Digits" and part["individual_digits"]):
            return False
    return has_pattern


def _normalizes_nothing_or_nfc(normalizer: Any) -> bool:
    return normalizer is None or json.loads(normalizer.__getstate__())["type"] == "NFC"


def _any_of(contents: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, contents)) or r"(?!)")


def _overlapping(contents: list[str]) -> list[str]:
    """The added tokens, longest first, of which one can begin inside another."""
    by_prefix: dict[str, set[str]] = {}
    for content in contents:
        for end in range(1, len(content) + 1):
            by_prefix.setdefault(content[:end], set()).add(content)
    whole, lengths, found = set(contents), {len(content) for content in contents}, set()
    for content in contents:
        for start in range(1, len(content)):
            rest = content[start:]
            others = by_prefix.get(rest, set()) | (whole & {rest[:length] for length in lengths})
            found |= others | ({content} if others else set())
    return [content for content in contents if content in found]
