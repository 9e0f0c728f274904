"""What the completions of one model look like, without a judge: lengths, diversity, repetition, refusals.

In: `Completed`s. Out: `TextFigures`. Words are runs of letters and digits without their case, so the figures of words say
little where a language does not separate words by spaces.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from stages.compare.completions import Completed

WORD = re.compile(r"\w+")
REPEATED_NGRAM = 4
# The beginnings of refusals, a heuristic: it misses other wordings, and counts polite answers that begin like this.
REFUSALS = (
    "i can't help",
    "i cannot help",
    "i can't assist",
    "i cannot assist",
    "i can't provide",
    "i cannot provide",
    "i can't do that",
    "i cannot do that",
    "i won't",
    "i will not",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i must decline",
    "i'm sorry, but",
    "i am sorry, but",
    "sorry, but i",
    "as an ai",
    "as a language model",
)
REFUSAL_WITHIN = 100


@dataclass(frozen=True)
class TextFigures:
    """Figures of the completions of one model; shares are from 0 to 1, tokens None where a file has none.

    distinct_1, distinct_2: different words (pairs of words) in all completions, divided by all of them (arXiv 1510.03055).
    repetition: share of the 4-word sequences of a completion that occurred in it before, mean over completions (seq-rep-4,
        arXiv 1908.04319); completions of fewer than 4 words count as 0.
    refusals: share that begins like a refusal, by a list of phrases: a heuristic.
    unfinished: share that reached the token limit; None where the file does not say.
    """

    completions: int
    mean_characters: float
    median_characters: float
    mean_tokens: float | None
    median_tokens: float | None
    distinct_1: float
    distinct_2: float
    repetition: float
    refusals: float
    unfinished: float | None


def text_figures(completions: Sequence[Completed]) -> TextFigures:
    """The figures of at least one completion."""
    texts = [entry.completion for entry in completions]
    words = [WORD.findall(text.casefold()) for text in texts]
    characters = [len(text) for text in texts]
    tokens = [entry.num_tokens for entry in completions if entry.num_tokens is not None]
    has_tokens = len(tokens) == len(completions)
    reasons = [entry.finish_reason for entry in completions if entry.finish_reason is not None]
    return TextFigures(
        completions=len(completions),
        mean_characters=fmean(characters),
        median_characters=median(characters),
        mean_tokens=fmean(tokens) if has_tokens else None,
        median_tokens=median(tokens) if has_tokens else None,
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        repetition=fmean(map(_repetition, words)),
        refusals=fmean(map(is_refusal, texts)),
        unfinished=sum(reason == "length" for reason in reasons) / len(reasons) if reasons else None,
    )


def is_refusal(text: str) -> bool:
    """Whether the beginning of a text has one of the phrases."""
    start = text[:REFUSAL_WITHIN].casefold().replace("\u2019", "'")
    return any(phrase in start for phrase in REFUSALS)


def _distinct(words: Sequence[Sequence[str]], size: int) -> float:
    found = [ngram for text in words for ngram in _ngrams(text, size)]
    return len(set(found)) / len(found) if found else 0.0


def _repetition(words: Sequence[str]) -> float:
    found = list(_ngrams(words, REPEATED_NGRAM))
    return 1 - len(set(found)) / len(found) if found else 0.0


def _ngrams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)
