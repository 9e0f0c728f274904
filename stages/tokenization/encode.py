"""From rendered text to token ids and the mask of the trained tokens.

The prompt's ids are those of the prompt alone, as in sampling. Prompt and completions are tokenized apart where that
provably gives the ids of the whole text (`token_boundaries.py`), so that a prompt is tokenized once for all its
completions; elsewhere the whole text is. Where tokens would merge across the boundary, such as the line breaks of a
generation prompt and of a reply, the completion is tokenized as a continuation, and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np

from stages.data.source_row import BadRow
from stages.formats.contract import Preference, Tokens
from stages.tokenization.completion_parts import TextPart
from stages.tokenization.fastokens_backend import FastokensBackend
from stages.tokenization.lost_characters import LostCharacters
from stages.tokenization.render import Rendered
from stages.tokenization.special_token_text import EscapedTextEncoder, not_encodable
from stages.tokenization.token_boundaries import TokenBoundaries

# Texts tried in front of a continuation, so that it is not tokenized as the beginning of a text.
ANCHORS = ("\n", ".", "a")
NO_PROMPT = "the prompt has no tokens; the model needs at least one to predict from"


@dataclass(frozen=True)
class Encoded:
    """A preference as ids: the prompt (int32), and `(ids, mask)` of each completion (int32 and bool, one per token).

    `num_merged`: completions whose first token would merge with the prompt's last. `loses_characters`: the tokenizer
    has no ids for some character of the text.
    """

    prompt_ids: np.ndarray
    completions: list[tuple[np.ndarray, np.ndarray]]
    num_merged: int = 0
    loses_characters: bool = False


@dataclass(frozen=True)
class Text:
    """A text to tokenize; with `add_special_tokens` the tokenizer adds its own around it, as to a beginning."""

    text: str
    add_special_tokens: bool


@dataclass(frozen=True)
class TextBatch:
    """The texts to tokenize for rendered preferences: of each the prompt, then of each completion its parts or the whole.

    `is_split` says which of the two, for each completion in turn.
    """

    rendered: Sequence[Rendered]
    texts: list[Text]
    is_split: list[bool]


# The encodings of the texts with and without `add_special_tokens`, each in the order of the texts.
Tokenized = dict[bool, Sequence[Any]]


class Encoder:
    """Tokenizes rendered preferences with one tokenizer, many at a time."""

    def __init__(self, tokenizer: Any, quick: bool = False) -> None:
        """Use a fast Hugging Face tokenizer, without the truncation and padding its file may carry.

        With `quick`, fastokens encodes.
        """
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.batch_backend = FastokensBackend(backend) if quick else backend
        self._vocab_size = len(tokenizer)
        self._boundaries = TokenBoundaries(backend)
        self._lost_characters = LostCharacters(tokenizer)
        self._num_prepended, self._num_appended = _num_added(backend)

    def texts_of(self, rendered: Sequence[Rendered]) -> TextBatch:
        """Which texts are tokenized, and which completions in parts."""
        texts: list[Text] = []
        is_split: list[bool] = []
        for item in rendered:
            if item.escape or item.pretokenized is not None:
                continue
            texts.append(Text(item.prompt, item.is_plain))
            tail = self._boundaries.tail(item.prompt)
            for parts in item.completions:
                is_split.append(self._can_split(tail, item.prompt, parts))
                if is_split[-1]:
                    texts += [Text(part.text, False) for part in parts]
                else:
                    texts.append(Text(item.prompt + _joined(parts), item.is_plain))
        return TextBatch(rendered, texts, is_split)

    def tokenize(self, texts: Sequence[Text]) -> Tokenized:
        """The tokenizer's work: nearly all of it in Rust, outside the GIL, so that it can run beside Python in a thread."""
        found: Tokenized = {}
        for special in (True, False):
            # A chat template writes its own beginning-of-sequence token; plain text gets the tokenizer's.
            own = [text.text for text in texts if text.add_special_tokens == special]
            if own:
                found[special] = self.batch_backend.encode_batch_fast(own, add_special_tokens=special)
        return found

    def encoded(self, batch: TextBatch, tokenized: Tokenized) -> list[Encoded | BadRow]:
        """The preferences of a batch as ids, in order; in place of one that cannot be encoded, the reason."""
        ids, is_split = iter(self.ids_of(batch.texts, tokenized)), iter(batch.is_split)
        results: list[Encoded | BadRow] = []
        for item in batch.rendered:
            try:
                if item.pretokenized is not None:
                    results.append(self._pretokenized(item.pretokenized))
                elif item.escape:
                    results.append(self._escaped(item))
                else:
                    prompt_ids = next(ids)
                    # All of the item's ids are taken before any of them can turn out to be unusable.
                    pieces = [
                        [next(ids) for _ in parts] if next(is_split) else next(ids)
                        for parts in item.completions
                    ]
                    results.append(self._assembled(item, prompt_ids, pieces))
            except BadRow as problem:
                results.append(problem)
        return results

    def encode_texts(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Token ids of texts on their own, int32."""
        return self.ids_of(texts, self.tokenize(texts))

    def ids_of(self, texts: Sequence[Text], tokenized: Tokenized) -> list[np.ndarray]:
        """Token ids of each text, int32: views of one array, without what the tokenizer appends."""
        result: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
        for special, encodings in tokenized.items():
            index = [number for number, text in enumerate(texts) if text.add_special_tokens == special]
            lists = [encoding.ids for encoding in encodings]
            starts = list(accumulate(map(len, lists), initial=0))
            flat = np.fromiter(chain.from_iterable(lists), np.int32, starts[-1])
            num_appended = self._num_appended if special else 0
            for number, start, end in zip(index, starts, starts[1:], strict=False):
                result[number] = flat[start : end - num_appended]
        return result

    def _can_split(self, tail: str | None, prompt: str, parts: list[TextPart]) -> bool:
        if tail is None or not prompt:
            return False
        before, texts = prompt, [part.text for part in parts]
        for number, text in enumerate(texts):
            if not self._boundaries.can_split(tail, before, "".join(texts[number:])):
                return False
            if number + 1 < len(texts):
                before += text
                tail = self._boundaries.tail(before)
        return True

    def _assembled(
        self, item: Rendered, prompt_ids: np.ndarray, pieces: list[list[np.ndarray] | np.ndarray]
    ) -> Encoded:
        """A preference from the ids of its prompt and, of each completion, those of its parts or of the whole text."""
        if not len(prompt_ids):
            raise BadRow(NO_PROMPT)
        completions, num_merged = [], 0
        for parts, ids in zip(item.completions, pieces, strict=True):
            if isinstance(ids, list):
                completions.append(_concatenated(parts, ids))
                continue
            head, own = item.prompt, ids[len(prompt_ids) :]
            if not np.array_equal(ids[: len(prompt_ids)], prompt_ids):
                head, own = self._continuation(_joined(parts))
                num_merged += 1
            mask = np.ones(len(own), dtype=bool)
            if not all(part.is_trained for part in parts):
                mask = self._mask(head, parts, len(own))
            completions.append((own, mask))
        return Encoded(prompt_ids, completions, num_merged, self._lost_characters.any_in(item))

    def _mask(self, head: str, parts: list[TextPart], num_tokens: int) -> np.ndarray:
        """Which of the last `num_tokens` tokens of `head` and `parts` together lie in a part that is trained; bool."""
        encoding = self._backend.encode(head + _joined(parts), add_special_tokens=False)
        ends = np.cumsum([len(head)] + [len(part.text) for part in parts])
        is_trained = np.array([False] + [part.is_trained for part in parts])
        # A token belongs to the part that holds its last character. (Byte-level tokenizers may leave
        # spaces out of the offsets; a token of nothing but a space then begins and ends behind it.)
        last = np.array([end - 1 for _, end in encoding.offsets[len(encoding.ids) - num_tokens :]])
        return is_trained[np.searchsorted(ends, last, side="right")]

    def _continuation(self, text: str) -> tuple[str, np.ndarray]:
        """An anchor, and the ids of `text` tokenized behind it, for a text that would merge with its prompt."""
        for anchor in ANCHORS:
            head = self._backend.encode(anchor, add_special_tokens=False).ids
            whole = self._backend.encode(anchor + text, add_special_tokens=False).ids
            if whole[: len(head)] == head:
                return anchor, np.array(whole[len(head) :], dtype=np.int32)
        raise BadRow("the completion cannot be tokenized as a continuation of the prompt")

    @cached_property
    def _escaped_texts(self) -> EscapedTextEncoder:
        return EscapedTextEncoder(self._backend)

    def _escaped(self, item: Rendered) -> Encoded:
        """Ids of a row with special tokens in its text; each part apart, where that gives the ids of the whole."""
        prompt, completions = self._escaped_texts.encode(item.prompt, item.escape), []
        for parts in item.completions:
            ids = [self._escaped_texts.encode(part.text, item.escape) for part in parts]
            whole = self._escaped_texts.encode(item.prompt + _joined(parts), item.escape)
            if not np.array_equal(whole, np.concatenate([prompt, *ids])):
                raise not_encodable()
            completions.append(_concatenated(parts, ids))
        before = self._backend.encode("a").ids[: self._num_prepended if item.is_plain else 0]
        prompt = np.concatenate([np.array(before, np.int32), prompt])
        if not len(prompt):
            raise BadRow(NO_PROMPT)
        return Encoded(prompt, completions, loses_characters=self._lost_characters.any_in(item))

    def _pretokenized(self, preference: Preference) -> Encoded:
        """The ids of a row that brought them, checked against the vocabulary."""
        values = [preference.prompt, *(candidate.completion for candidate in preference.candidates)]
        prompt, *completions = [value for value in values if isinstance(value, Tokens)]
        largest = max((max(tokens.ids, default=0) for tokens in (prompt, *completions)), default=0)
        if largest >= self._vocab_size:
            raise BadRow(f"token id {largest}: the tokenizer has {self._vocab_size:,} ids")
        if not prompt.ids:
            raise BadRow(NO_PROMPT)
        return Encoded(np.array(prompt.ids, dtype=np.int32), [_with_mask(tokens) for tokens in completions])


def _joined(parts: list[TextPart]) -> str:
    return "".join(part.text for part in parts)


def _concatenated(parts: list[TextPart], ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a completion whose parts were tokenized apart."""
    if len(parts) == 1:
        return ids[0], np.full(len(ids[0]), parts[0].is_trained)
    mask = np.repeat(np.array([part.is_trained for part in parts], dtype=bool), [len(own) for own in ids])
    return np.concatenate([np.zeros(0, np.int32), *ids]), mask


def _with_mask(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    mask = [True] * len(tokens.ids) if tokens.mask is None else tokens.mask
    return np.array(tokens.ids, dtype=np.int32), np.array(mask, dtype=bool)


def _num_added(backend: Any) -> tuple[int, int]:
    """How many special tokens a tokenizer itself puts before and behind every text."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (
        start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare
    )
    start = next(starts, len(whole) - len(bare)) if bare else len(whole)
    return start, len(whole) - start - len(bare)
