"""From messages to text, and to token ids and the mask of what is trained (`encoding.py`).

With a chat template, the prompt is rendered with its generation prompt and must be a prefix of the
whole conversation; only assistant turns are kept by the mask. Without one, a plain prompt and its
completion are simply joined, and messages use `PLAIN_TEMPLATE`.
"""

import hashlib
import json
from functools import cached_property
from typing import Any, Literal

from cache.errors import DataError
from stages.chat_template import ChatTemplate
from stages.columns import Message
from stages.encoding import Encoded, Encoder, Rendered, Segment
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


class Template:
    """Renders and tokenizes preferences with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        mode: Literal["auto", "chat", "plain"],
        append_eos: bool,
        quick: bool = False,
    ) -> None:
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
        self._encoder = Encoder(tokenizer.backend_tokenizer, quick)
        self._special = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            | set(tokenizer.all_special_tokens)
        )

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(str(self._source), self.tokenizer.special_tokens_map)

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What changes the token ids: tokenizer, template, rules of this file."""
        return {
            "render_version": RENDER_VERSION,
            "tokenizer": self._tokenizer_sha256,
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
        return self._encoder.encode(batch)

    def encode_prompts(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        """Token ids of prompts alone."""
        return self._encoder.encode_texts(texts, plain)

    def turn_end_ids(self) -> list[int]:
        """Ids that end a completion: end of sequence, and the special token that closes a turn."""
        ends = {self.tokenizer.eos_token_id}
        if self.uses_chat:
            turn = [{"role": "user", "content": "a"}]
            parts = self._segments(turn, self._apply(turn, True), [{"role": "assistant", "content": "b"}])
            ends.add(self._encoder.encode_texts([parts[-1].text], [False])[0][-1])
        return sorted(end for end in ends if end is not None)

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
            return self._chat.render(turns, open_turn)
        except Exception as error:
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from error

    def _refuse_forged_turns(self, preference: Preference) -> None:
        texts: list[str] = []
        _collect(texts, [preference.prompt, *(candidate.completion for candidate in preference.candidates)])
        # Joined by what no special token holds, so that each is looked for once.
        joined = "\0".join(texts)
        for token in self._special:
            if token in joined:
                raise BadRow(f"the text spells the special token {token}, with which data could forge a turn")


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


def _collect(texts: list[str], value: Any) -> None:
    """Add every text inside a message, a list of messages, or a text."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            texts.append(key)
            _collect(texts, part)
    elif isinstance(value, list):
        for part in value:
            _collect(texts, part)
