"""Rows left out on purpose: by length, score gap, language tag, pattern, and evaluation prompts they repeat.

Everything here is decided by one row alone; `duplicates.py` compares rows with each other. A row that is left out raises
`Unusable` with the reason it is counted under.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cache.errors import DataError, UsageError
from stages.data.messages import as_messages
from stages.data.prompt_rows import user_texts
from stages.data.readers import read_source
from stages.data.source_row import BadRow
from stages.formats import Preference, Tokens, Unusable
from stages.settings.data import DataSettings, FilterSettings
from stages.tokenization.encode import Encoded

WORD = re.compile(r"\w+")
SHORT_WORDS = 6


class Filters:
    """The checks of the `filter` block."""

    def __init__(self, settings: FilterSettings) -> None:
        """Raises `UsageError` for an invalid pattern, and `DataError` for files that cannot be read."""
        self.settings = settings
        try:
            self._pattern = re.compile(settings.drop_pattern) if settings.drop_pattern else None
        except re.error as error:
            raise UsageError(f"filter.drop_pattern is not a regular expression: {error}.") from error
        self._evaluation = EvaluationPrompts(settings.decontaminate, settings.decontaminate_words)

    def notes(self) -> list[str]:
        """What is said of evaluation prompts that cannot be used, in at most one line."""
        problems = self._evaluation.problems
        if not problems:
            return []
        return [f"filter.decontaminate: {len(problems):,} prompts cannot be used, the first is {problems[0]}"]

    def check_content(self, row: Mapping[str, Any], preference: Preference) -> None:
        """Raise `Unusable` where the columns or texts of a row are filtered."""
        settings = self.settings
        if settings.language is not None:
            tag = row.get(settings.language_column)
            if str(tag).casefold() != settings.language.casefold():
                raise Unusable("filter_language" if tag is not None else "filter_no_language")
        if settings.min_score_gap is not None:
            scores = [entry.score for entry in preference.candidates if entry.score is not None]
            if len(scores) < 2:
                raise Unusable("filter_no_scores")
            if max(scores) - min(scores) < settings.min_score_gap:
                raise Unusable("filter_score_gap")
        if self._pattern is not None and any(map(self._pattern.search, texts_of(preference))):
            raise Unusable("filter_pattern")
        if any(map(self._evaluation.is_in, _texts(preference.prompt))):
            raise Unusable("filter_evaluation_prompt")

    def check_lengths(self, encoded: Encoded) -> None:
        """Raise `Unusable` where the lengths of a row, before truncation, are filtered."""
        settings = self.settings
        if not _is_within(len(encoded.prompt_ids), settings.min_prompt_tokens, settings.max_prompt_tokens):
            raise Unusable("filter_prompt_length")
        least, most = settings.min_completion_tokens, settings.max_completion_tokens
        if not all(_is_within(len(ids), least, most) for ids, _ in encoded.completions):
            raise Unusable("filter_completion_length")


class EvaluationPrompts:
    """Evaluation prompts, as sequences of words in lower case.

    A text contains one if it has `num_words` consecutive words of it (as GPT-3's 13-grams, 2005.14165, appendix
    C), or, where the prompt has no more than that, all of its words. A prompt of fewer than SHORT_WORDS words is too
    common to be looked for inside other texts: it must be the whole text.
    """

    def __init__(self, paths: list[str], num_words: int) -> None:
        self._sequences: dict[int, set[tuple[str, ...]]] = {}
        self._short: set[tuple[str, ...]] = set()
        self.problems: list[str] = []
        for path in paths:
            texts, problems = _evaluation_texts(path)
            self.problems += problems
            for text in texts:
                words = words_of(text)
                size = min(num_words, len(words))
                if 0 < len(words) < SHORT_WORDS:
                    self._short.add(tuple(words))
                elif size:
                    self._sequences.setdefault(size, set()).update(_sequences(words, size))

    def is_in(self, text: str) -> bool:
        """Whether `text` contains an evaluation prompt, or enough of one."""
        if not self._sequences and not self._short:
            return False
        words = words_of(text)
        return tuple(words) in self._short or any(
            sequence in known
            for size, known in self._sequences.items()
            for sequence in _sequences(words, size)
        )


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return WORD.findall(text.casefold())


def texts_of(preference: Preference) -> list[str]:
    """The texts of a prompt and its completions."""
    found = _texts(preference.prompt)
    for candidate in preference.candidates:
        found += _texts(candidate.completion, "assistant")
    return found


def _texts(value: Any, role: str = "user") -> list[str]:
    if isinstance(value, Tokens):
        return []
    return [str(turn["content"]) for turn in as_messages(value, role)]


def _evaluation_texts(path: str) -> tuple[list[str], list[str]]:
    """The user turns of the prompts in a file, and what is wrong with those that cannot be read; `DataError` for all."""
    texts, problems = [], []
    for row in read_source(DataSettings(path=path)):
        try:
            if row.value is None:
                raise BadRow(row.problem)
            texts += user_texts(row.value)
        except BadRow as problem:
            problems.append(f"{row.location}: {problem}")
    if problems and not texts:
        raise DataError(f"{problems[0]}. No prompt of {path} can be read.")
    return texts, problems


def _sequences(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _is_within(length: int, least: int | None, most: int | None) -> bool:
    return (least is None or length >= least) and (most is None or length <= most)
