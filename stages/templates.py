"""From text or messages to token ids and the mask of what is trained.

With a chat template, the prompt is rendered with its generation prompt and must be a prefix of the
whole conversation; only assistant turns are kept by the mask. Without one, a plain prompt and its
completion are simply joined, and messages use the template `plain`. The prompt's ids are those of the
prompt alone, as in sampling: where tokens would merge across the cut, such as the line breaks of a
generation prompt and of a reply, the completion is tokenized as a continuation, and counted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.chat_templates import choose_source, marks_of
from stages.columns import Message
from stages.formats.contract import Candidate, Preference, Tokens
from stages.reading import BadRow
from stages.rendering import ChatTemplate

RENDER_VERSION = 3
# Texts tried in front of a continuation, to tokenize it as a continuation and not as a beginning.
ANCHORS = ("\n", ".", "a")
# An assistant's own reasoning may be written into its content; these open no turn.
REASONING_MARKS = ("<think>", "</think>")
# What a message may carry beside its content, and what a template that shows it must name.
REQUIRED_KEYS = ("tool_calls",)
OPTIONAL_KEYS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered completion and whether its tokens are trained."""

    text: str
    kept: bool


@dataclass(frozen=True)
class Rendered:
    """A preference as text: the prompt and the segments of each candidate.

    `ready` instead, where the row brought token ids. `unused` are the reasoning fields that the template does not show.
    """

    prompt: str
    completions: list[list[Segment]]
    plain: bool
    ready: "Encoded | None" = None
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """A preference as ids: the prompt, and `(ids, mask)` for each candidate; int32 and bool."""

    prompt_ids: np.ndarray
    completions: list[tuple[np.ndarray, np.ndarray]]
    rejoined: int


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
        source, name, joins_plain = choose_source(tokenizer, choice)
        if append_eos and tokenizer.eos_token is None:
            raise DataError(
                f"{tokenizer.name_or_path} has no end-of-sequence token. Use --set prepare.append_eos=false."
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.uses_chat = not joins_plain
        # What tokenizer.json says of truncation and padding was set for another use.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._num_appended = _num_appended(tokenizer.backend_tokenizer)
        variables = {**tokenizer.special_tokens_map, "leading_bos": _leading_bos(tokenizer)}
        self._chat = ChatTemplate(source, name, variables)
        self._source = source
        self._special = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            | set(tokenizer.all_special_tokens)
        )
        self._marks = sorted(marks_of(source) | set(self._special))

    def notes(self) -> list[str]:
        """What a person should know of the template with this tokenizer, one line each."""
        known = self.tokenizer.get_vocab()
        spelled = [mark for mark in marks_of(self._source) if mark not in known]
        written = [mark for mark in sorted(spelled) if mark in self._example()]
        if not written:
            return []
        return [
            f"{self._chat.name[0].upper()}{self._chat.name[1:]} writes {', '.join(written)}, which this tokenizer spells with several ordinary tokens; {self.tokenizer.eos_token} ends a completion."
        ]

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
        if isinstance(preference.prompt, Tokens):
            return Rendered("", [], False, self._ready(preference))
        self._refuse_forged_turns(preference)
        prompt = preference.prompt
        if isinstance(prompt, str):
            if self.uses_chat:
                return self.render(_as_turns(preference, prompt))
            return Rendered(
                prompt,
                [self._closed([Segment(str(c.completion), True)]) for c in preference.candidates],
                True,
            )
        unused = self._unused(preference)
        head, _ = self._apply(prompt, True, preference.tools)
        segments = self._spans if self._chat.marks_generation else self._segments
        parts = [
            segments(prompt, head, _turns(candidate.completion), preference.tools)
            for candidate in preference.candidates
        ]
        return Rendered(head, parts, False, unused=unused)

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
                results.append(item.ready or self._split(item, prompt_ids, own))
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

    def _segments(
        self, prompt: list[Message], head: str, turns: list[Message], tools: list[Any] | None
    ) -> list[Segment]:
        """The parts of a completion, found by rendering the conversation up to each turn."""
        parts, text = [], head
        for number, message in enumerate(turns):
            history = prompt + turns[: number + 1]
            if message["role"] == "assistant":
                if number:
                    opened, _ = self._apply(history[:-1], True, tools)
                    parts.append(Segment(_continues(text, opened), False))
                    text = opened
                whole, _ = self._apply(history, False, tools)
                turn = _continues(text, whole)
                end = self._end_of_turn(turn)
                parts += [Segment(turn[:end], message.get("weight") != 0), Segment(turn[end:], False)]
            else:
                whole, _ = self._apply(history, False, tools)
                parts.append(Segment(_continues(text, whole), False))
            text = whole
        return self._closed([part for part in parts if part.text])

    def _spans(
        self, prompt: list[Message], head: str, turns: list[Message], tools: list[Any] | None
    ) -> list[Segment]:
        """The parts of a completion as the template's `{% generation %}` blocks say, each with its end token."""
        whole, spans = self._apply(prompt + turns, False, tools)
        _continues(head, whole)
        said = [message for message in turns if message["role"] == "assistant"]
        spans = [(max(start, len(head)), end) for start, end in spans if end > len(head)]
        if len(spans) != len(said):
            raise BadRow(
                f"the chat template marks {len(spans)} spans of {{% generation %}} in a completion of {len(said)} assistant turns"
            )
        parts, text = [], len(head)
        for message, (start, end) in zip(said, spans, strict=True):
            end += self._end_token(whole[end:])
            parts += [
                Segment(whole[text:start], False),
                Segment(whole[start:end], message.get("weight") != 0),
            ]
            text = end
        return self._closed([part for part in [*parts, Segment(whole[text:], False)] if part.text])

    def _end_token(self, after: str) -> int:
        """Length of the special token that closes a turn right behind its text, 0 where there is none."""
        return max((len(token) for token in self._special if after.startswith(token)), default=0)

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

    def _apply(
        self, turns: list[Message], open_turn: bool, tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        shown = [_without_weight(turn) for turn in turns]
        return self._chat.render(shown, open_turn, tools)

    def _example(self) -> str:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self._apply(turn, False, None)[0]
        except BadRow:
            return ""

    def _unused(self, preference: Preference) -> tuple[str, ...]:
        """The reasoning fields that the template leaves out; raises `BadRow` where it leaves out tools."""
        turns = [
            *_turns(preference.prompt),
            *(m for c in preference.candidates for m in _turns(c.completion)),
        ]
        needed = [key for key in REQUIRED_KEYS if any(key in turn for turn in turns)]
        needed += ["tools"] if preference.tools else []
        for key in needed:
            if not self._chat.mentions(key):
                raise BadRow(f"{key}: {self._chat.name} does not show them; choose another prepare.template")
        return tuple(
            key
            for key in OPTIONAL_KEYS
            if any(key in turn for turn in turns) and not self._chat.mentions(key)
        )

    def _refuse_forged_turns(self, preference: Preference) -> None:
        turns = [preference.prompt, preference.tools or []]
        for spoken, value in [(False, turns), (True, [c.completion for c in preference.candidates])]:
            for text in _strings(value):
                for token in self._marks:
                    if token in text and not (token in REASONING_MARKS and spoken):
                        raise BadRow(
                            f"the text spells the special token {token}, with which data could forge a turn"
                        )

    def _ready(self, preference: Preference) -> "Encoded":
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


def _turns(value: Any) -> list[Message]:
    """Messages; a text as one assistant turn."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _as_turns(preference: Preference, prompt: str) -> Preference:
    """A preference of plain texts as a conversation of two turns."""
    candidates = [replace(c, completion=_turns(c.completion)) for c in preference.candidates]
    return replace(preference, prompt=[{"role": "user", "content": prompt}], candidates=candidates)


def _without_weight(message: Message) -> Message:
    return (
        {key: value for key, value in message.items() if key != "weight"} if "weight" in message else message
    )


def _continues(before: str, whole: str) -> str:
    if not whole.startswith(before):
        raise BadRow(
            "the chat template rewrites earlier turns, so the prompt is not a prefix of the whole conversation"
        )
    return whole[len(before) :]


def _leading_bos(tokenizer: Any) -> str:
    """The beginning-of-sequence token where the tokenizer puts it before every text of its own accord."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return (
        tokenizer.bos_token if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id] else ""
    )


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
