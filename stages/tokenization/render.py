"""From a preference to text: the prompt with its generation prompt, and the parts of each completion.

With a chat template, the prompt must be a prefix of the whole conversation, and only the assistant's turns are
trained. Where the template has `{% generation %}` blocks, those say which text is trained; elsewhere a turn is what it
adds to the rendering of the conversation before it. Special tokens in a row's text stay text (`special_token_text.py`).
"""

from dataclasses import dataclass, replace
from typing import Any

from stages.data.messages import Message, as_messages, without_weight
from stages.data.source_row import BadRow
from stages.formats.contract import Preference, Tokens
from stages.tokenization.chat_template import ChatTemplate
from stages.tokenization.named_templates import PLAIN_MARKS, choose_source, marks_of
from stages.tokenization.shown_text import are_in_order, check_shown
from stages.tokenization.special_token_text import SpecialTokenText


@dataclass(frozen=True)
class TextPart:
    """A piece of a rendered completion, and whether its tokens are trained."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class Rendered:
    """A preference as text: the prompt and the parts of each completion.

    `is_plain`: joined without a chat template. `hidden`: names of reasoning that the template does not show.
    `escape`: the escape character inside the special tokens of the row's text, "" where it has none.
    `pretokenized`: the preference itself where the row brought token ids; then there is no text.
    """

    prompt: str
    completions: list[list[TextPart]]
    is_plain: bool
    hidden: frozenset[str] = frozenset()
    escape: str = ""
    pretokenized: Preference | None = None

    @property
    def text(self) -> str:
        """All of the text, as the row has it."""
        text = self.prompt + "".join(part.text for parts in self.completions for part in parts)
        return text.replace(self.escape, "") if self.escape else text


class Renderer:
    """Renders preferences with one template, and knows where turns begin and end."""

    def __init__(self, tokenizer: Any, choice: str, append_eos: bool) -> None:
        """`choice` is as `prepare.template`. Raises `DataError` when there is no such template."""
        source, name, joins_plain = choose_source(tokenizer, choice)
        self.tokenizer, self.append_eos, self.uses_chat = tokenizer, append_eos, not joins_plain
        variables = {**tokenizer.special_tokens_map, "leading_bos": _leading_bos(tokenizer)}
        self.chat = ChatTemplate(source, name, variables)
        self._special = SpecialTokenText(tokenizer)
        self._marks = sorted(marks_of(source) | set(self._special.tokens))

    @property
    def published_source(self) -> str:
        """The template for other programs, which do not know the variable `leading_bos`."""
        if not self.chat.mentions("leading_bos"):
            return self.chat.source
        value = "bos_token" if self.chat.variables["leading_bos"] else "''"
        return f"{{% set leading_bos = {value} %}}{self.chat.source}"

    def notes(self) -> list[str]:
        """What a person should know about the template with this tokenizer, one line each."""
        known = self.tokenizer.get_vocab()
        ordinary = sorted(mark for mark in marks_of(self.chat.source) if mark not in known)
        example = self._example()
        written = [mark for mark in ordinary if mark in example and mark not in PLAIN_MARKS]
        if not written:
            return []
        return [
            f"{self.chat.name[0].upper()}{self.chat.name[1:]} writes {', '.join(written)}, which this tokenizer spells with several ordinary tokens; {self.tokenizer.eos_token} ends a completion."
        ]

    def render(self, preference: Preference) -> Rendered:
        """Text of a preference; raises `BadRow` when the template fails, rewrites the prompt or leaves out a text."""
        if isinstance(preference.prompt, Tokens):
            return Rendered("", [], False, pretokenized=preference)
        if isinstance(preference.prompt, str):
            return self.render(_as_turns(preference)) if self.uses_chat else self._plain(preference)
        preference, escape = self._special.escaped(preference, self._marks)
        prompt = _turns(preference.prompt)
        self._check_tools_are_read(preference)
        head, _ = self._apply(prompt, True, preference.tools)
        split = self._parts_by_generation_blocks if self.chat.marks_generation else self._parts_by_turns
        parts = [
            split(prompt, head, _turns(candidate.completion), preference.tools)
            for candidate in preference.candidates
        ]
        return Rendered(head, parts, False, self._hidden(preference, head, parts), escape)

    def _hidden(self, preference: Preference, head: str, completions: list[list[TextPart]]) -> frozenset[str]:
        """The names of reasoning that the texts leave out; raises `BadRow` where they leave out something else."""
        prompt, tools, name = _turns(preference.prompt), preference.tools, self.chat.name
        hidden: set[str] = set()
        if tools or not are_in_order(prompt, head):
            hidden |= check_shown(prompt, tools, head, name)
        for candidate, parts in zip(preference.candidates, completions, strict=True):
            text, turns = "".join(part.text for part in parts), _turns(candidate.completion)
            if not are_in_order(turns, text):
                hidden |= check_shown([*prompt, *turns], tools, head + text, name)
        return frozenset(hidden)

    def _plain(self, preference: Preference) -> Rendered:
        preference, escape = self._special.escaped(preference, self._special.tokens)
        parts = [self._ended([TextPart(str(c.completion), True)]) for c in preference.candidates]
        return Rendered(str(preference.prompt), parts, True, escape=escape)

    def _parts_by_turns(
        self, prompt: list[Message], head: str, turns: list[Message], tools: list[Any] | None
    ) -> list[TextPart]:
        """The parts of a completion, found by rendering the conversation up to each turn."""
        parts, text = [], head
        for number, message in enumerate(turns):
            history = prompt + turns[: number + 1]
            if message["role"] == "assistant":
                if number:
                    opened, _ = self._apply(history[:-1], True, tools)
                    parts.append(TextPart(_continues(text, opened), False))
                    text = opened
                whole, _ = self._apply(history, False, tools)
                turn = _continues(text, whole)
                end = self._end_of_turn(turn)
                parts += [TextPart(turn[:end], message.get("weight") != 0), TextPart(turn[end:], False)]
            else:
                whole, _ = self._apply(history, False, tools)
                parts.append(TextPart(_continues(text, whole), False))
            text = whole
        return self._ended([part for part in parts if part.text])

    def _parts_by_generation_blocks(
        self, prompt: list[Message], head: str, turns: list[Message], tools: list[Any] | None
    ) -> list[TextPart]:
        """The parts of a completion as the template's `{% generation %}` blocks mark them, each with its end token."""
        whole, spans = self._apply(prompt + turns, False, tools)
        _continues(head, whole)
        answers = [message for message in turns if message["role"] == "assistant"]
        spans = [(max(start, len(head)), end) for start, end in spans if end >= len(head)]
        if len(spans) != len(answers):
            raise BadRow(
                f"the chat template marks {len(spans)} spans of {{% generation %}} in a completion of {len(answers)} assistant turns"
            )
        parts, position = [], len(head)
        for message, (start, end) in zip(answers, spans, strict=True):
            end += self._end_token_length(whole[end:])
            parts += [
                TextPart(whole[position:start], False),
                TextPart(whole[start:end], message.get("weight") != 0),
            ]
            position = end
        return self._ended([part for part in [*parts, TextPart(whole[position:], False)] if part.text])

    def _end_token_length(self, after: str) -> int:
        """Characters of the special token that follows an assistant's text, 0 where none does."""
        return max((len(token) for token in self._special.tokens if after.startswith(token)), default=0)

    def _ended(self, parts: list[TextPart]) -> list[TextPart]:
        """Let the last assistant turn end with exactly one end token: cut what follows it, or append one."""
        last = next((number for number in reversed(range(len(parts))) if parts[number].is_trained), None)
        if last is None or not parts[last].text.strip():
            return parts
        text = parts[last].text
        if self.append_eos and not self._has_end_token(text):
            text += self.tokenizer.eos_token
        return [*parts[:last], TextPart(text, True)]

    def _end_of_turn(self, turn: str) -> int:
        """Where a rendered assistant turn ends: after its end token, or, where it has none, at its very end."""
        stripped = turn.rstrip()
        return len(stripped) if self._has_end_token(stripped) else len(turn)

    def _has_end_token(self, text: str) -> bool:
        return any(text.endswith(token) for token in self._special.tokens)

    def _apply(
        self, turns: list[Message], add_generation_prompt: bool, tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        return self.chat.render([without_weight(turn) for turn in turns], add_generation_prompt, tools)

    def _example(self) -> str:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self._apply(turns, False, None)[0]
        except BadRow:
            return ""

    def _check_tools_are_read(self, preference: Preference) -> None:
        """Raise `BadRow` where the template reads no tools and the preference has some."""
        sides = [preference.prompt, *(candidate.completion for candidate in preference.candidates)]
        calls = any("tool_calls" in turn for side in sides for turn in _turns(side))
        for key, is_used in (("tool_calls", calls), ("tools", bool(preference.tools))):
            if is_used and not self.chat.mentions(key):
                raise BadRow(f"{key}: {self.chat.name} does not show them; choose another prepare.template")


def _turns(value: Any) -> list[Message]:
    """Messages; a text as one assistant turn."""
    return as_messages(value, "assistant")


def _as_turns(preference: Preference) -> Preference:
    """A preference of plain texts as a conversation of two turns."""
    candidates = [replace(c, completion=_turns(c.completion)) for c in preference.candidates]
    prompt = [{"role": "user", "content": preference.prompt}]
    return replace(preference, prompt=prompt, candidates=candidates)


def _continues(before: str, whole: str) -> str:
    """The text that `whole` adds to `before`."""
    if not whole.startswith(before):
        raise BadRow(
            "the chat template rewrites earlier turns, so the prompt is not a prefix of the whole conversation"
        )
    return whole[len(before) :]


def _leading_bos(tokenizer: Any) -> str:
    """The beginning-of-sequence token where the tokenizer itself puts it before every text."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return (
        tokenizer.bos_token if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id] else ""
    )
