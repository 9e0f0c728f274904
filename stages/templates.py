"""From rendered preferences to token ids and the mask of what is trained.

`turns.py` makes the text, of which the prompt is a prefix. The prompt's ids are those of the
prompt alone, as in sampling: where tokens would merge across the cut, such as the line breaks of a
generation prompt and of a reply, the completion is tokenized as a continuation, and counted.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.columns import Message
from stages.formats.contract import Candidate, Preference, Tokens
from stages.reading import BadRow
from stages.turns import Rendered, Segment, Turns

RENDER_VERSION = 3
# Texts tried in front of a continuation, to tokenize it as a continuation and not as a beginning.
ANCHORS = ("\n", ".", "a")
# A tokenizer that has ids for these has them for every character (they take bytes of two, three and four).
RARE_CHARACTERS = "é東🦊"


@dataclass(frozen=True)
class Encoded:
    """A preference as ids: the prompt, and `(ids, mask)` for each candidate; int32 and bool."""

    prompt_ids: np.ndarray
    completions: list[tuple[np.ndarray, np.ndarray]]
    rejoined: int
    # Whether the tokenizer has no ids for some of the characters.
    loses_text: bool = False


class Template:
    """Renders and tokenizes preferences with one tokenizer."""

    def __init__(self, tokenizer: Any, choice: str, append_eos: bool) -> None:
        """Use `tokenizer` (a fast Hugging Face tokenizer) and the template that `choice` names.

        `choice` is as `prepare.template`. Raises `DataError` when it cannot be had.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json). Convert it with transformers."
            )
        self._turns = Turns(tokenizer, choice, append_eos)
        if append_eos and tokenizer.eos_token is None:
            raise DataError(
                f"{tokenizer.name_or_path} has no end-of-sequence token. Use --set prepare.append_eos=false."
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.uses_chat = self._turns.uses_chat
        self._source = self._turns.chat.source
        # What tokenizer.json says of truncation and padding was set for another use.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._num_appended = _num_appended(tokenizer.backend_tokenizer)
        self._lost: dict[str, bool] = {}
        self._knows_every_character = not self._loses(RARE_CHARACTERS)

    def notes(self) -> list[str]:
        """What a person should know of the template with this tokenizer, one line each."""
        return self._turns.notes()

    def identity(self) -> dict[str, Any]:
        """What changes the token ids: tokenizer, template, rules of this file."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        return {
            "render_version": RENDER_VERSION,
            "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
            "special_tokens": json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            "template": hashlib.sha256(str(self._source).encode()).hexdigest(),
            "append_eos": self.append_eos,
        }

    def render(self, preference: Preference) -> Rendered:
        """Text of a preference; raises `BadRow` when the template fails or rewrites the prompt."""
        return self._turns.render(preference)

    def prompt_text(self, prompt: str | list[Message], tools: list[Any] | None = None) -> tuple[str, bool]:
        """A prompt alone, ready to be continued, and whether it is plain text."""
        rendered = self.render(Preference(prompt, [], tools))
        return rendered.prompt, rendered.plain

    def encode(self, batch: list[Rendered]) -> list[Encoded | BadRow]:
        """Token ids of rendered preferences, tokenized together in Rust threads."""
        prompts = self._encode([item.prompt for item in batch], [item.plain for item in batch])
        wholes = [
            (item.prompt + "".join(part.text for part in parts), item.plain)
            for item in batch
            for parts in item.completions
        ]
        ids = iter(self._encode([text for text, _ in wholes], [plain for _, plain in wholes]))
        results: list[Encoded | BadRow] = []
        for item, prompt_ids in zip(batch, prompts, strict=True):
            own = [next(ids) for _ in item.completions]
            try:
                results.append(
                    self._checked(item.ready) if item.ready else self._split(item, prompt_ids, own)
                )
            except BadRow as problem:
                results.append(problem)
        return results

    def encode_prompts(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        """Token ids of prompts alone."""
        return self._encode(texts, plain)

    def turn_end_ids(self) -> list[int]:
        """Ids that end a completion: end of sequence, and the special token that closes a turn."""
        ends = {self.tokenizer.eos_token_id}
        if self.uses_chat:
            turn = [{"role": "user", "content": "a"}]
            parts = self.render(Preference(turn, [Candidate("b", "chosen")])).completions[0]
            ends.add(self._encode([parts[-1].text], [False])[0][-1])
        return sorted(end for end in ends if end is not None)

    def _split(self, item: Rendered, prompt_ids: list[int], wholes: list[list[int]]) -> Encoded:
        if not prompt_ids:
            raise BadRow("the prompt has no tokens; the model needs at least one to predict from")
        completions, rejoined = [], 0
        text = item.prompt + "".join(part.text for parts in item.completions for part in parts)
        loses_text = not self._knows_every_character and self._loses(text)
        for parts, whole in zip(item.completions, wholes, strict=True):
            head, ids = item.prompt, whole[len(prompt_ids) :]
            if whole[: len(prompt_ids)] != prompt_ids:
                head, ids = self._continuation("".join(part.text for part in parts))
                rejoined += 1
            mask = np.ones(len(ids), dtype=bool)
            if not all(part.kept for part in parts):
                mask = self._mask(head, parts, len(ids))
            completions.append((np.array(ids, dtype=np.int32), mask))
        return Encoded(np.array(prompt_ids, dtype=np.int32), completions, rejoined, loses_text)

    def _mask(self, head: str, parts: list[Segment], num_tokens: int) -> np.ndarray:
        """Which of the last `num_tokens` tokens of `head` and `parts` together lie in a part that is kept."""
        encoding = self.tokenizer.backend_tokenizer.encode(
            head + "".join(part.text for part in parts), add_special_tokens=False
        )
        ends = np.cumsum([len(head)] + [len(part.text) for part in parts])
        kept = np.array([False] + [part.kept for part in parts])
        # A token belongs to the segment that holds its last character. (Byte-level tokenizers may leave
        # spaces out of the offsets; a token of nothing but a space then begins and ends behind it.)
        last = np.array([end - 1 for _, end in encoding.offsets[len(encoding.ids) - num_tokens :]])
        return kept[np.searchsorted(ends, last, side="right")]

    def _encode(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        result: list[list[int]] = [[]] * len(texts)
        for special in (True, False):
            index = [number for number, flag in enumerate(plain) if flag == special]
            # A chat template writes its own beginning-of-sequence token; plain text gets the tokenizer's.
            encodings = backend.encode_batch_fast(
                [texts[number] for number in index], add_special_tokens=special
            )
            for number, encoding in zip(index, encodings, strict=True):
                added = self._num_appended if special else 0
                result[number] = encoding.ids[: len(encoding.ids) - added]
        return result

    def _loses(self, text: str) -> bool:
        """Whether the tokenizer has no ids for some character of a text, or only that of the unknown."""
        backend, unknown = self.tokenizer.backend_tokenizer, self.tokenizer.unk_token_id
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        for character in set(text) - self._lost.keys():
            ids = backend.encode(f"a{character}a", add_special_tokens=False).ids
            plain = backend.encode("aa", add_special_tokens=False).ids
            self._lost[character] = ids == plain or (unknown in ids and unknown not in plain)
        return any(self._lost[character] for character in set(text))

    def _continuation(self, text: str) -> tuple[str, list[int]]:
        """Ids of text that continues a prompt with which it would merge, and the text it was tokenized after."""
        backend = self.tokenizer.backend_tokenizer
        for anchor in ANCHORS:
            head = backend.encode(anchor, add_special_tokens=False).ids
            whole = backend.encode(anchor + text, add_special_tokens=False).ids
            if whole[: len(head)] == head:
                return anchor, whole[len(head) :]
        raise BadRow("the completion cannot be tokenized as a continuation of the prompt")

    def _checked(self, preference: Preference) -> Encoded:
        """The ids of a row that brought them, checked against the vocabulary."""
        tokens = [preference.prompt, *(candidate.completion for candidate in preference.candidates)]
        sides = [side for side in tokens if isinstance(side, Tokens)]
        largest = max((max(side.ids, default=0) for side in sides), default=0)
        if largest >= len(self.tokenizer):
            raise BadRow(f"token id {largest}: the tokenizer has {len(self.tokenizer):,} ids")
        if not sides[0].ids:
            raise BadRow("the prompt has no tokens; the model needs at least one to predict from")
        completions = [
            (
                np.array(side.ids, dtype=np.int32),
                np.array(side.mask or [True] * len(side.ids), dtype=bool),
            )
            for side in sides[1:]
        ]
        return Encoded(np.array(sides[0].ids, dtype=np.int32), completions, 0)


def _num_appended(backend: Any) -> int:
    """How many tokens, such as an end of sequence, a tokenizer appends to every text of its own accord."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (
        start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare
    )
    start = next(starts, len(whole) - len(bare)) if bare else len(whole)
    return len(whole) - start - len(bare)
