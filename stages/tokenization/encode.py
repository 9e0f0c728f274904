"""From rendered text to token ids and the mask of what is trained.

The prompt's ids are those of the prompt alone, as in sampling. Prompt and completions are tokenized
apart where that provably gives the ids of the whole text (`token_boundaries.py`), so that a prompt is tokenized
once for all its completions; elsewhere the whole text is. Where tokens would merge across the cut, such
as the line breaks of a generation prompt and of a reply, the completion is tokenized as a
continuation, and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np

from stages.data.source_row import BadRow
from stages.tokenization.fastokens_backend import QuickTokenizer
from stages.tokenization.render import Rendered, Segment
from stages.tokenization.special_token_text import SpelledText, unsure
from stages.tokenization.token_boundaries import Joins

# Texts tried in front of a continuation, to tokenize it as a continuation and not as a beginning.
ANCHORS = ("\n", ".", "a")
NO_PROMPT = "the prompt has no tokens; the model needs at least one to predict from"


@dataclass(frozen=True)
class Encoded:
    """A preference as ids: the prompt, and `(ids, mask)` for each candidate; int32 and bool."""

    prompt_ids: np.ndarray
    completions: list[tuple[np.ndarray, np.ndarray]]
    rejoined: int
    # Whether the tokenizer has no ids for some of the characters.
    loses_text: bool = False


@dataclass(frozen=True)
class Text:
    """A text to tokenize; `opens` gives it what the tokenizer puts around a text of its own accord."""

    text: str
    opens: bool


@dataclass(frozen=True)
class Plan:
    """The texts that stand for a batch: of each row the prompt, then of each completion its parts or the whole.

    `apart` says which of the two, for each completion in turn.
    """

    batch: Sequence[Rendered]
    texts: list[Text]
    apart: list[bool]


# The encodings of the texts that open, and of those that do not, in their order.
Tokenized = dict[bool, Sequence[Any]]


class Encoder:
    """Tokenizes rendered preferences with one `tokenizers.Tokenizer`, in its Rust threads."""

    def __init__(self, backend: Any, quick: bool = False) -> None:
        """Use `backend` without the truncation and padding its file may carry; `quick` lets fastokens do its work."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._batches = QuickTokenizer(backend) if quick else backend
        self._joins = Joins(backend)
        self._num_prepended, self._num_appended = _num_around(backend)

    def encode(self, batch: Sequence[Rendered]) -> list[Encoded | BadRow]:
        """Token ids of rendered preferences, tokenized together: all three steps."""
        plan = self.plan(batch)
        return self.finish(plan, self.tokenize(plan.texts))

    def plan(self, batch: Sequence[Rendered]) -> Plan:
        """Which texts are tokenized, and whether they are wholes or parts."""
        texts: list[Text] = []
        apart: list[bool] = []
        for item in batch:
            if item.breaker:
                continue
            texts.append(Text(item.prompt, item.plain))
            tail = self._joins.tail(item.prompt)
            for parts in item.completions:
                is_apart = self._are_separate(tail, item.prompt, parts)
                apart.append(is_apart)
                if is_apart:
                    texts += [Text(part.text, False) for part in parts]
                else:
                    texts.append(Text(item.prompt + "".join(part.text for part in parts), item.plain))
        return Plan(batch, texts, apart)

    def tokenize(self, texts: Sequence[Text]) -> Tokenized:
        """The tokenizer's part: nearly all of it in Rust, outside Python's lock."""
        found: Tokenized = {}
        for opens in (True, False):
            # A chat template writes its own beginning-of-sequence token; plain text gets the tokenizer's.
            own = [text.text for text in texts if text.opens == opens]
            if own:
                found[opens] = self._batches.encode_batch_fast(own, add_special_tokens=opens)
        return found

    def finish(self, plan: Plan, tokenized: Tokenized) -> list[Encoded | BadRow]:
        """What the tokenizer found, put together; rows that spell special tokens are tokenized here."""
        ids, separate = iter(self._ids(plan.texts, tokenized)), iter(plan.apart)
        results: list[Encoded | BadRow] = []
        for item in plan.batch:
            if item.breaker:
                results.append(self._spelled(item))
                continue
            prompt_ids = next(ids)
            pieces = [
                (is_apart := next(separate), [next(ids) for _ in range(len(parts) if is_apart else 1)])
                for parts in item.completions
            ]
            try:
                results.append(self._assembled(item, prompt_ids, pieces))
            except BadRow as problem:
                results.append(problem)
        return results

    @cached_property
    def _spelled_text(self) -> SpelledText:
        return SpelledText(self._backend)

    def _spelled(self, item: Rendered) -> Encoded | BadRow:
        """Ids of a row whose text spells special tokens; each part apart, where that gives the ids of the whole."""
        try:
            prompt, completions = self._spelled_text.encode(item.prompt, item.breaker), []
            for parts in item.completions:
                ids = [self._spelled_text.encode(part.text, item.breaker) for part in parts]
                text = item.prompt + "".join(part.text for part in parts)
                whole = self._spelled_text.encode(text, item.breaker)
                if not np.array_equal(whole, np.concatenate([prompt, *ids])):
                    raise unsure()
                completions.append(_joined(parts, ids))
            before = self._backend.encode("a").ids[: self._num_prepended if item.plain else 0]
            prompt = np.concatenate([np.array(before, np.int32), prompt])
            if not len(prompt):
                raise BadRow(NO_PROMPT)
            return Encoded(prompt, completions, 0)
        except BadRow as problem:
            return problem

    def encode_texts(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        """Token ids of texts alone; `plain` ones get the beginning-of-sequence token of the tokenizer."""
        asked = [Text(text, opens) for text, opens in zip(texts, plain, strict=True)]
        return [ids.tolist() for ids in self._ids(asked, self.tokenize(asked))]

    def _are_separate(self, tail: str | None, prompt: str, parts: list[Segment]) -> bool:
        if tail is None or not prompt:
            return False
        before, texts = prompt, [part.text for part in parts]
        for number, text in enumerate(texts):
            if not self._joins.are_separate(tail, before, "".join(texts[number:])):
                return False
            if number + 1 < len(texts):
                before += text
                tail = self._joins.tail(before)
        return True

    def _assembled(
        self, item: Rendered, prompt_ids: np.ndarray, pieces: list[tuple[bool, list[np.ndarray]]]
    ) -> Encoded:
        if not len(prompt_ids):
            raise BadRow(NO_PROMPT)
        completions, rejoined = [], 0
        for parts, (is_apart, own) in zip(item.completions, pieces, strict=True):
            if is_apart:
                completions.append(_joined(parts, own))
                continue
            [whole] = own
            head, ids = item.prompt, whole[len(prompt_ids) :]
            if not np.array_equal(whole[: len(prompt_ids)], prompt_ids):
                head, ids = self._continuation("".join(part.text for part in parts))
                rejoined += 1
            mask = np.ones(len(ids), dtype=bool)
            if not all(part.kept for part in parts):
                mask = self._mask(head, parts, len(ids))
            completions.append((ids, mask))
        return Encoded(prompt_ids, completions, rejoined)

    def _mask(self, head: str, parts: list[Segment], num_tokens: int) -> np.ndarray:
        """Which of the last `num_tokens` tokens of `head` and `parts` together lie in a part that is kept."""
        encoding = self._backend.encode(head + "".join(part.text for part in parts), add_special_tokens=False)
        ends = np.cumsum([len(head)] + [len(part.text) for part in parts])
        kept = np.array([False] + [part.kept for part in parts])
        # A token belongs to the segment that holds its last character. (Byte-level tokenizers may leave
        # spaces out of the offsets; a token of nothing but a space then begins and ends behind it.)
        last = np.array([end - 1 for _, end in encoding.offsets[len(encoding.ids) - num_tokens :]])
        return kept[np.searchsorted(ends, last, side="right")]

    def _ids(self, texts: Sequence[Text], tokenized: Tokenized) -> list[np.ndarray]:
        """Token ids of each text, int32: views of one array."""
        result: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
        for opens, encodings in tokenized.items():
            index = [number for number, text in enumerate(texts) if text.opens == opens]
            lists = [encoding.ids for encoding in encodings]
            starts = list(accumulate(map(len, lists), initial=0))
            flat = np.fromiter(chain.from_iterable(lists), np.int32, starts[-1])
            added = self._num_appended if opens else 0
            for number, start, end in zip(index, starts, starts[1:], strict=False):
                result[number] = flat[start : end - added]
        return result

    def _continuation(self, text: str) -> tuple[str, np.ndarray]:
        """The text that ids were tokenized after, and the ids of `text`, which would merge with its prompt."""
        for anchor in ANCHORS:
            head = self._backend.encode(anchor, add_special_tokens=False).ids
            whole = self._backend.encode(anchor + text, add_special_tokens=False).ids
            if whole[: len(head)] == head:
                return anchor, np.array(whole[len(head) :], dtype=np.int32)
        raise BadRow("the completion cannot be tokenized as a continuation of the prompt")


def _joined(parts: list[Segment], ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a completion whose segments were tokenized apart."""
    if len(parts) == 1:
        return ids[0], np.full(len(ids[0]), parts[0].kept)
    mask = np.repeat(np.array([part.kept for part in parts], dtype=bool), [len(own) for own in ids])
    return np.concatenate([np.zeros(0, np.int32), *ids]), mask


def _num_around(backend: Any) -> tuple[int, int]:
    """How many tokens a tokenizer puts before and behind every text of its own accord."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (
        start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare
    )
    start = next(starts, len(whole) - len(bare)) if bare else len(whole)
    return start, len(whole) - start - len(bare)
