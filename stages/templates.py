"""From text or messages to token ids and the mask of what is trained.

With a chat template, the prompt is rendered with its generation prompt and must be a prefix of the
whole conversation; only assistant turns are kept by the mask. Without one, a plain prompt and its
completion are simply joined, and messages use `PLAIN_TEMPLATE`. The prompt's ids are those of the
prompt alone, as in sampling: where tokens would merge across the cut, such as the line breaks of a
generation prompt and of a reply, the completion is tokenized as a continuation, and counted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cache.errors import DataError
from stages.columns import Message
from stages.formats import Candidate, Preference
from stages.reading import BadRow

RENDER_VERSION = 2
# For base models: the transcript style of hh-rlhf, which needs no special tokens but end of sequence.
# (Line breaks stand inside expressions, because `-%}` would swallow them.)
PLAIN_TEMPLATE = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '\n\nAssistant: ' ~ message['content'] ~ (eos_token or '') -}}"
    "{%- elif message['role'] == 'user' -%}{{- '\n\nHuman: ' ~ message['content'] -}}"
    "{%- else -%}{{- '\n\n' ~ (message['role'] | capitalize) ~ ': ' ~ message['content'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}"
)
# Texts tried in front of a continuation, to tokenize it as a continuation and not as a beginning.
ANCHORS = ("\n", ".", "a")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered completion and whether its tokens are trained."""

    text: str
    kept: bool


@dataclass(frozen=True)
class Rendered:
    """A preference as text: the prompt and the segments of each candidate."""

    prompt: str
    completions: list[list[Segment]]
    plain: bool


@dataclass(frozen=True)
class Encoded:
    """A preference as ids: the prompt, and `(ids, mask)` for each candidate; int32 and bool."""

    prompt_ids: np.ndarray
    completions: list[tuple[np.ndarray, np.ndarray]]
    rejoined: int


class Template:
    """Renders and tokenizes preferences with one tokenizer."""

    def __init__(self, tokenizer: Any, mode: Literal["auto", "chat", "plain"], append_eos: bool) -> None:
        """Use `tokenizer` (a fast Hugging Face tokenizer); raises `DataError` when `mode` cannot be had."""
        if not tokenizer.is_fast:
            raise DataError(
                f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json). Convert it with transformers."
            )
        if mode == "chat" and not tokenizer.chat_template:
            raise DataError(
                f"{tokenizer.name_or_path} has no chat template. Use --set prepare.template=plain, or add one to the model folder."
            )
        if append_eos and tokenizer.eos_token is None:
            raise DataError(
                f"{tokenizer.name_or_path} has no end-of-sequence token. Use --set prepare.append_eos=false."
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.uses_chat = mode != "plain" and bool(tokenizer.chat_template)
        self._source = _chat_template(tokenizer) if self.uses_chat else PLAIN_TEMPLATE
        # What tokenizer.json says of truncation and padding was set for another use.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._num_appended = _num_appended(tokenizer.backend_tokenizer)
        self._special = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            | set(tokenizer.all_special_tokens)
        )

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
        self._refuse_forged_turns(preference)
        prompt = preference.prompt
        if isinstance(prompt, str):
            if self.uses_chat:
                turns = Preference(
                    [{"role": "user", "content": prompt}],
                    [
                        Candidate([{"role": "assistant", "content": str(c.completion)}], c.role, c.score)
                        for c in preference.candidates
                    ],
                )
                return self.render(turns)
            return Rendered(
                prompt,
                [self._closed([Segment(str(c.completion), True)]) for c in preference.candidates],
                True,
            )
        head = self._apply(prompt, True)
        return Rendered(
            head, [self._segments(prompt, head, c.completion) for c in preference.candidates], False
        )

    def prompt_text(self, prompt: str | list[Message]) -> tuple[str, bool]:
        """A prompt alone, ready to be continued, and whether it is plain text."""
        rendered = self.render(Preference(prompt, []))
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
                results.append(self._split(item, prompt_ids, own))
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
            parts = self._segments(turn, self._apply(turn, True), [{"role": "assistant", "content": "b"}])
            ends.add(self._encode([parts[-1].text], [False])[0][-1])
        return sorted(end for end in ends if end is not None)

    def _split(self, item: Rendered, prompt_ids: list[int], wholes: list[list[int]]) -> Encoded:
        if not prompt_ids:
            raise BadRow("the prompt has no tokens; the model needs at least one to predict from")
        completions, rejoined = [], 0
        for parts, whole in zip(item.completions, wholes, strict=True):
            head, ids = item.prompt, whole[len(prompt_ids) :]
            if whole[: len(prompt_ids)] != prompt_ids:
                head, ids = self._continuation("".join(part.text for part in parts))
                rejoined += 1
            mask = np.ones(len(ids), dtype=bool)
            if not all(part.kept for part in parts):
                mask = self._mask(head, parts, len(ids))
            completions.append((np.array(ids, dtype=np.int32), mask))
        return Encoded(np.array(prompt_ids, dtype=np.int32), completions, rejoined)

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

    def _continuation(self, text: str) -> tuple[str, list[int]]:
        """Ids of text that continues a prompt with which it would merge, and the text it was tokenized after."""
        backend = self.tokenizer.backend_tokenizer
        for anchor in ANCHORS:
            head = backend.encode(anchor, add_special_tokens=False).ids
            whole = backend.encode(anchor + text, add_special_tokens=False).ids
            if whole[: len(head)] == head:
                return anchor, whole[len(head) :]
        raise BadRow("the completion cannot be tokenized as a continuation of the prompt")

    def _segments(self, prompt: list[Message], head: str, completion: str | list[Message]) -> list[Segment]:
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        parts, text = [], head
        for number, message in enumerate(turns):
            history = prompt + turns[: number + 1]
            if message["role"] == "assistant":
                if number:
                    opened = self._apply(history[:-1], True)
                    parts.append(Segment(_continues(text, opened), False))
                    text = opened
                whole = self._apply(history, False)
                turn = _continues(text, whole)
                end = self._end_of_turn(turn)
                parts += [Segment(turn[:end], True), Segment(turn[end:], False)]
            else:
                whole = self._apply(history, False)
                parts.append(Segment(_continues(text, whole), False))
            text = whole
        return self._closed([part for part in parts if part.text])

    def _closed(self, parts: list[Segment]) -> list[Segment]:
        """Let the last assistant turn end with exactly one end token: cut what follows it, or append one."""
        last = next((number for number in reversed(range(len(parts))) if parts[number].kept), None)
        if last is None or not parts[last].text.strip():
            return parts
        text = parts[last].text
        if self.append_eos and not self._is_closed(text):
            text += self.tokenizer.eos_token
        return [*parts[:last], Segment(text, True)]

    def _end_of_turn(self, turn: str) -> int:
        """Where a rendered assistant turn ends: after its end token, or, where it has none, at its very end."""
        closed = turn.rstrip()
        return len(closed) if self._is_closed(closed) else len(turn)

    def _is_closed(self, text: str) -> bool:
        return any(text.endswith(token) for token in self._special)

    def _apply(self, turns: list[Message], open_turn: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self._source, tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from error

    def _refuse_forged_turns(self, preference: Preference) -> None:
        for text in _strings(
            [preference.prompt, *(candidate.completion for candidate in preference.candidates)]
        ):
            for token in self._special:
                if token in text:
                    raise BadRow(
                        f"the text spells the special token {token}, with which data could forge a turn"
                    )


def _continues(before: str, whole: str) -> str:
    if not whole.startswith(before):
        raise BadRow(
            "the chat template rewrites earlier turns, so the prompt is not a prefix of the whole conversation"
        )
    return whole[len(before) :]


def _chat_template(tokenizer: Any) -> str:
    """The template's source; of several, the one called default."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{tokenizer.name_or_path} has several chat templates and none is called default "
            f"({', '.join(tokenizer.chat_template)}). Leave one in the model folder, or use --set prepare.template=plain."
        ) from error


def _num_appended(backend: Any) -> int:
    """How many tokens, such as an end of sequence, a tokenizer appends to every text of its own accord."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (
        start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare
    )
    start = next(starts, len(whole) - len(bare)) if bare else len(whole)
    return len(whole) - start - len(bare)


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a message, a list of messages, or a text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
