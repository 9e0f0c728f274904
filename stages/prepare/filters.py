"""Rows left out on purpose: by length, score gap, language tag, pattern, and evaluation prompts they repeat.

Everything here is decided by one row alone; `duplicates.py` compares rows with each other. Each answer is the
reason under which a row is counted, or None for a row that stays.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cache.errors import DataError, UsageError
from stages.data.messages import as_messages, prompt_column
from stages.data.readers import read_source
from stages.data.source_row import BadRow
from stages.formats import Preference, Tokens
from stages.settings.data import DataSettings, FilterSettings
from stages.tokenization.encode import Encoded

WORD = re.compile(r"\w+")
SHORT_WORDS = 6


class Filters:
    """The `filter` block, ready to be asked."""

    def __init__(self, settings: FilterSettings) -> None:
        """Raises `UsageError` for a pattern that is none, and `DataError` for files that cannot be read."""
        self.settings = settings
        try:
            self._pattern = re.compile(settings.drop_pattern) if settings.drop_pattern else None
        except re.error as error:
            raise UsageError(f"filter.drop_pattern is no regular expression: {error}.") from error
        self._evaluation = Evaluation(settings.decontaminate, settings.decontaminate_words)

    def before_rendering(self, row: Mapping[str, Any], preference: Preference) -> str | None:
        """The reason to drop a row, from its columns and texts."""
        settings = self.settings
        if settings.language is not None:
            tag = row.get(settings.language_column)
            if str(tag).casefold() != settings.language.casefold():
                return "filter_language" if tag is not None else "filter_no_language"
        if settings.min_score_gap is not None:
            scores = [entry.score for entry in preference.candidates if entry.score is not None]
            if len(scores) < 2:
                return "filter_no_scores"
            if max(scores) - min(scores) < settings.min_score_gap:
                return "filter_score_gap"
        if self._pattern is not None and any(map(self._pattern.search, texts_of(preference))):
            return "filter_pattern"
        if any(map(self._evaluation.is_in, _said(preference.prompt))):
            return "filter_evaluation_prompt"
        return None

    def after_encoding(self, encoded: Encoded) -> str | None:
        """The reason to drop a row, from its lengths before anything is cut."""
        settings = self.settings
        if not _is_within(len(encoded.prompt_ids), settings.min_prompt_tokens, settings.max_prompt_tokens):
            return "filter_prompt_length"
        least, most = settings.min_completion_tokens, settings.max_completion_tokens
        if not all(_is_within(len(ids), least, most) for ids, _ in encoded.completions):
            return "filter_completion_length"
        return None


class Evaluation:
    """Evaluation prompts, by their words in lower case.

    A text holds one if it has `num_words` of its words in a row (as GPT-3's 13-grams, 2005.14165, appendix
    C), or, where the prompt has no more than that, all of its words in a row. Prompts of fewer than
    SHORT_WORDS words say too little to be found inside others: they must be the whole text.
    """

    def __init__(self, paths: list[str], num_words: int) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        self._short: set[tuple[str, ...]] = set()
        for path in paths:
            for text in _evaluation_texts(path):
                words = words_of(text)
                size = min(num_words, len(words))
                if 0 < len(words) < SHORT_WORDS:
                    self._short.add(tuple(words))
                elif size:
                    self._runs.setdefault(size, set()).update(_runs(words, size))

    def is_in(self, text: str) -> bool:
        """Whether `text` holds an evaluation prompt, or enough of one."""
        if not self._runs and not self._short:
            return False
        words = words_of(text)
        return tuple(words) in self._short or any(
            run in known for size, known in self._runs.items() for run in _runs(words, size)
        )


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return WORD.findall(text.casefold())


def texts_of(preference: Preference) -> list[str]:
    """The texts of a prompt and its completions."""
    found = _said(preference.prompt)
    for candidate in preference.candidates:
        found += _said(candidate.completion, "assistant")
    return found


def _said(value: Any, role: str = "user") -> list[str]:
    if isinstance(value, Tokens):
        return []
    return [str(turn["content"]) for turn in as_messages(value, role)]


def _evaluation_texts(path: str) -> Iterator[str]:
    """The prompts in a file; every question of several turns is one."""
    for row in read_source(DataSettings(path=path)):
        if row.value is None:
            raise DataError(f"{row.location}: {row.problem}.")
        try:
            column = prompt_column(row.value)
            value = row.value[column]
            turns = value if isinstance(value, list) else [value]
            for turn in turns:
                text = turn["content"] if isinstance(turn, Mapping) else turn
                if not isinstance(turn, Mapping) or turn.get("role") == "user":
                    if not isinstance(text, str):
                        raise BadRow(f"{column}: expected text")
                    yield text
        except (BadRow, KeyError) as error:
            raise DataError(f"{row.location}: {error}.") from error


def _runs(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _is_within(length: int, least: int | None, most: int | None) -> bool:
    return (least is None or length >= least) and (most is None or length <= most)
