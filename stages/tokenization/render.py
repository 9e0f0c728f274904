"""From a preference to text: the prompt with its generation prompt, and the parts of each completion.

With a chat template, the prompt must be a prefix of the whole conversation, and only the assistant's turns are
kept. Where the template has `{% generation %}` blocks those say what is kept; elsewhere a turn is what it adds to
the rendering of the conversation before it. A special token in a row's text stays text (`spelled.py`); a text
that could be taken for a mark the template writes with ordinary tokens is refused.
"""

from dataclasses import dataclass, replace
from typing import Any

from stages.data.messages import Message
from stages.data.source_row import BadRow, Flagged
from stages.formats.contract import Preference, Tokens
from stages.tokenization.jinja_sandbox import ChatTemplate
from stages.tokenization.named_templates import PLAIN_MARKS, choose_source, marks_of
from stages.tokenization.special_token_text import broken

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

    Or, where the row brought token ids, `ready` is the preference itself. `unused` are the reasoning fields that the template does not show.
    `breaker` is the character inside the special tokens that the row itself spells (`spelled.py`).
    """

    prompt: str
    completions: list[list[Segment]]
    plain: bool
    ready: Preference | None = None
    unused: tuple[str, ...] = ()
    breaker: str = ""


class Turns:
    """Renders preferences with the template that `choice` names, and knows where turns begin and end."""

    def __init__(self, tokenizer: Any, choice: str, append_eos: bool) -> None:
        """`choice` is as `prepare.template`. Raises `DataError` when it cannot be had."""
        source, name, joins_plain = choose_source(tokenizer, choice)
        self.tokenizer, self.append_eos, self.uses_chat = tokenizer, append_eos, not joins_plain
        variables = {**tokenizer.special_tokens_map, "leading_bos": _leading_bos(tokenizer)}
        self.chat = ChatTemplate(source, name, variables)
        self._special_tokens = {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        } | set(tokenizer.all_special_tokens)
        # Longest first, because one can be part of another.
        self._special = sorted(self._special_tokens, key=lambda token: (-len(token), token))
        self._marks = sorted(marks_of(source) | set(self._special))

    def notes(self) -> list[str]:
        """What a person should know of the template with this tokenizer, one line each."""
        known = self.tokenizer.get_vocab()
        example = self._example()
        spelled = [mark for mark in marks_of(self.chat.source) if mark not in known]
        written = [mark for mark in sorted(spelled) if mark in example and mark not in PLAIN_MARKS]
        if not written:
            return []
        return [
            f"{self.chat.name[0].upper()}{self.chat.name[1:]} writes {', '.join(written)}, which this tokenizer spells with several ordinary tokens; {self.tokenizer.eos_token} ends a completion."
        ]

    def render(self, preference: Preference) -> Rendered:
        """Text of a preference; raises `BadRow` when the template fails or rewrites the prompt."""
        if isinstance(preference.prompt, Tokens):
            return Rendered("", [], False, preference)
        prompt = preference.prompt
        if isinstance(prompt, str):
            if self.uses_chat:
                return self.render(_as_turns(preference, prompt))
            preference, breaker = self._kept_as_text(preference, self._special)
            return Rendered(
                str(preference.prompt),
                [self._closed([Segment(str(c.completion), True)]) for c in preference.candidates],
                True,
                breaker=breaker,
            )
        preference, breaker = self._kept_as_text(preference, self._marks)
        prompt = _turns(preference.prompt)
        unused = self._unused(preference)
        head, _ = self._apply(prompt, True, preference.tools)
        segments = self._spans if self.chat.marks_generation else self._segments
        parts = [
            segments(prompt, head, _turns(candidate.completion), preference.tools)
            for candidate in preference.candidates
        ]
        return Rendered(head, parts, False, unused=unused, breaker=breaker)

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
        spans = [(max(start, len(head)), end) for start, end in spans if end >= len(head)]
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
        return self.chat.render(shown, open_turn, tools)

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
            if not self.chat.mentions(key):
                raise BadRow(f"{key}: {self.chat.name} does not show them; choose another prepare.template")
        return tuple(
            key for key in OPTIONAL_KEYS if any(key in turn for turn in turns) and not self.chat.mentions(key)
        )

    def _kept_as_text(self, preference: Preference, marks: list[str]) -> tuple[Preference, str]:
        """The preference with the special tokens broken that its texts spell, and the character that breaks them.

        Raises `Flagged` where they spell a mark that the template writes with ordinary tokens: nothing would
        tell the two apart.
        """
        asked, spoken = self._spelled(preference, marks)
        if not asked and not spoken:
            return preference, ""
        breaker = ""
        if not self._special_tokens.isdisjoint(asked + spoken):
            said = [mark for mark in self._special if mark not in REASONING_MARKS]
            preference, breaker = broken(preference, _text(preference), self._special, said)
            asked, spoken = self._spelled(preference, marks)
        if forged := asked + spoken:
            mark = forged[0]
            kind = "special token" if mark in self._special_tokens else "template's mark"
            raise Flagged(
                "spells_turn_mark",
                f"the text spells the {kind} {mark.strip()}, with which data could forge a turn",
            )
        return preference, breaker

    def _spelled(self, preference: Preference, marks: list[str]) -> tuple[list[str], list[str]]:
        """The marks that the prompt with its tools spells, and those that the completions do."""
        # Joined by what no mark holds, so that each is looked for once.
        asked = "\0".join(_strings([preference.prompt, preference.tools or []]))
        spoken = "\0".join(_strings([candidate.completion for candidate in preference.candidates]))
        return (
            [mark for mark in marks if mark in asked],
            [mark for mark in marks if mark in spoken and mark not in REASONING_MARKS],
        )


def _text(preference: Preference) -> str:
    """All text of a preference."""
    sides = [candidate.completion for candidate in preference.candidates]
    return "\0".join(_strings([preference.prompt, preference.tools or [], sides]))


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


def _strings(value: Any) -> list[str]:
    """Every text inside a message, a list of messages, or a text."""
    found: list[str] = []
    _collect(found, value)
    return found


def _collect(found: list[str], value: Any) -> None:
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            found.append(key)
            _collect(found, part)
    elif isinstance(value, list):
        for part in value:
            _collect(found, part)
