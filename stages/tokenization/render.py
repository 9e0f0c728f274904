"""From a preference to text: the prompt with its generation prompt, and the parts of each completion.

With a chat template, the prompt is what the model will see, and only what it has to write from there is trained
(`completion_parts.py`). Special tokens in a row's text stay text (`special_token_text.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cache.errors import DataError
from cache.fingerprint import canonical_json
from stages.data.messages import Message, as_messages, without_weight
from stages.data.source_row import BadRow, Flagged
from stages.formats.contract import Preference, Tokens
from stages.tokenization.call_arguments import has_calls, prints_objects, texts_of_arguments, with_texts
from stages.tokenization.chat_template import ChatTemplate
from stages.tokenization.completion_parts import CompletionParts, TextPart
from stages.tokenization.named_templates import NAMED, PLAIN_MARKS, choose_source, marks_of
from stages.tokenization.prefill import CONTINUED, NOT_ENDED, begun_text, begun_turn, continued, without_end
from stages.tokenization.roles import Roles
from stages.tokenization.shown_text import are_in_order, check_shown
from stages.tokenization.special_token_text import SpecialTokenText
from stages.tokenization.template_arguments import arguments, with_defaults
from stages.tokenization.thinking import LEFT_OUT, open_block, without_reasoning
from stages.tokenization.turn_ends import END, START, TurnEnds


@dataclass(frozen=True)
class Rendered:
    """A preference as text: the prompt and the parts of each completion.

    `is_plain`: joined without a chat template. `notes`: names under which `align prepare` counts the row.
    `escape`: the escape character inside the special tokens of the row's text, "" where it has none.
    `pretokenized`: the preference itself where the row brought token ids; then there is no text.
    """

    prompt: str
    completions: list[list[TextPart]]
    is_plain: bool
    notes: frozenset[str] = frozenset()
    escape: str = ""
    pretokenized: Preference | None = None

    @property
    def text(self) -> str:
        """All of the text, as the row has it."""
        text = self.prompt + "".join(part.text for parts in self.completions for part in parts)
        return text.replace(self.escape, "") if self.escape else text


@dataclass(frozen=True)
class RenderOptions:
    """How a template is used: the settings `prepare.thinking`, `chat_template_kwargs` and `system`, and the model's end tokens.

    `end_ids`: the ids at which the model's generation stops, besides the tokenizer's end-of-sequence token.
    """

    thinking: str = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    system: str = "refuse"
    end_ids: Sequence[int] = ()


class Renderer:
    """Renders preferences with one template, and knows where turns begin and end."""

    def __init__(
        self, tokenizer: Any, choice: str, append_eos: bool, options: RenderOptions | None = None
    ) -> None:
        """`choice` is as `prepare.template`. Raises `DataError` when there is no such template."""
        source, name, joins_plain = choose_source(tokenizer, choice)
        self.tokenizer, self.append_eos, self.uses_chat = tokenizer, append_eos, not joins_plain
        self.options = options or RenderOptions()
        variables = {**tokenizer.special_tokens_map, "leading_bos": _leading_bos(tokenizer)}
        self.chat = ChatTemplate(source, name, variables)
        self._is_fallback = joins_plain and choice == "auto"
        self.arguments = arguments(self.options.arguments, self.options.thinking, self.chat.mentions)
        self._special = SpecialTokenText(tokenizer)
        self._marks = sorted(marks_of(source) | set(self._special.tokens))
        self._opened: dict[bytes, str] = {}
        if self.options.thinking == "off" and open_block(self._opened_by(self.arguments)) is not None:
            raise DataError(
                f"{name[0].upper()}{name[1:]} opens a thinking block and has no argument that switches thinking off. Use --set prepare.thinking=empty, or the template's own argument in prepare.chat_template_kwargs."
            )
        self.ends = TurnEnds(self._declared_ends(), self._special.tokens, self._text_of)
        self._roles = Roles(self._text_of, self.options.system == "fold", self.chat.name)

    def _declared_ends(self) -> list[str]:
        """The end tokens of tokenizer and model that the template can write; others can end no turn of a rendering."""
        own = [self.tokenizer.eos_token] if self.tokenizer.eos_token is not None else []
        declared = self.tokenizer.convert_ids_to_tokens(list(self.options.end_ids))
        return own + sorted(token for token in declared if token and token in self.chat.source)

    @property
    def published_source(self) -> str:
        """The template for other programs, which know neither the variable `leading_bos` nor the template's arguments here."""
        source = self.chat.source
        if self.chat.mentions("leading_bos"):
            value = "bos_token" if self.chat.variables["leading_bos"] else "''"
            source = f"{{% set leading_bos = {value} %}}{source}"
        return with_defaults(self.arguments, source)

    def fallback_note(self) -> str | None:
        """What a person should know where conversations were written without a chat template of the model's own."""
        if not self._is_fallback:
            return None
        return f"{self.tokenizer.name_or_path} has no chat template, so conversations are written as {self._example()!r} (prepare.template=plain); others are {', '.join(list(NAMED)[1:])}, or a Jinja file"

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
        try:
            return self._conversation(preference)
        except Flagged:
            raise
        except BadRow as problem:
            raise self._roles.explained(preference, problem) from problem

    def _conversation(self, preference: Preference) -> Rendered:
        """A conversation as text, with the changes that the settings want, and tool calls in the form that the template reads."""
        preference, escape = self._special.escaped(preference, self._marks)
        preference, notes = self._changed(preference)
        calls = has_calls(preference)
        for key, is_used in (("tool_calls", calls), ("tools", preference.tools)):
            if is_used and not self.chat.mentions(key):
                raise BadRow(f"{key}: {self.chat.name} does not show them; choose another prepare.template")
        arguments = texts_of_arguments(preference) if calls else []
        if not arguments:
            return self._chat(preference, notes, escape)
        try:
            rendered = self._chat(preference, set(notes), escape)
        except BadRow:
            return self._chat(with_texts(preference), notes, escape)
        return (
            self._chat(with_texts(preference), notes, escape)
            if prints_objects(arguments, rendered.text)
            else rendered
        )

    def _chat(self, preference: Preference, notes: set[str], escape: str) -> Rendered:
        """A conversation as text, as it is."""
        own, tools = preference.chat_template_kwargs, preference.tools
        given = {**self.arguments, **own} if own else self.arguments

        def text_of(turns: list[Message], opens: bool) -> str:
            return self._apply(turns, opens, tools, given)[0]

        prompt = _turns(preference.prompt)
        begun = begun_turn(prompt)
        head = text_of(prompt, True) if begun is None else begun_text(text_of, prompt)
        if begun is not None:
            notes.add(CONTINUED)
            prompt = prompt[:-1]
        maker = CompletionParts(
            text_of,
            self.ends,
            prompt,
            head,
            self._opened_by(given),
            notes,
            begun is not None,
        )
        parts = []
        for candidate in preference.candidates:
            own_turns = _turns(candidate.completion)
            turns = own_turns if begun is None else continued(begun, own_turns)
            whole, spans = self._apply(prompt + turns, False, tools, given)
            spans = spans if self.chat.marks_generation else None
            found = maker.of(turns, whole, spans, self.options.thinking == "on")
            if not candidate.ends_turn:
                notes.add(NOT_ENDED)
            parts.append(
                self._ended(found, notes) if candidate.ends_turn else without_end(found, own_turns[-1])
            )
        notes.update(f"{name}_not_in_template" for name in self._hidden(preference, head, parts))
        return Rendered(head, parts, False, frozenset(notes), escape)

    def _changed(self, preference: Preference) -> tuple[Preference, set[str]]:
        """The preference as the settings want it, and the names under which the changes are counted."""
        notes: set[str] = set()
        preference = self._roles.arranged(preference, notes)
        if self.options.thinking in ("off", "empty"):
            bare = [without_reasoning(_turns(candidate.completion)) for candidate in preference.candidates]
            if any(had for _, had in bare):
                notes.add(LEFT_OUT)
                sides = zip(preference.candidates, bare, strict=True)
                candidates = [replace(candidate, completion=turns) for candidate, (turns, _) in sides]
                preference = replace(preference, candidates=candidates)
        return preference, notes

    def _opened_by(self, given: Mapping[str, Any]) -> str:
        """The generation prompt: what the template writes behind the text of a user for the model to go on from."""
        key = canonical_json(given) if given else b""
        if key not in self._opened:
            try:
                text, _ = self._apply([{"role": "user", "content": f"{START}a{END}"}], True, given=given)
            except BadRow:
                text = ""
            self._opened[key] = text.rpartition(END)[2]
        return self._opened[key]

    def _hidden(self, preference: Preference, head: str, completions: list[list[TextPart]]) -> set[str]:
        """The names of reasoning that the texts leave out; raises `BadRow` where they leave out something else."""
        prompt, tools, name = _turns(preference.prompt), preference.tools, self.chat.name
        hidden: set[str] = set()
        if tools or not are_in_order(prompt, head):
            hidden |= check_shown(prompt, tools, head, name)
        for candidate, parts in zip(preference.candidates, completions, strict=True):
            text, turns = "".join([part.text for part in parts]), _turns(candidate.completion)
            if not are_in_order(turns, text):
                hidden |= check_shown([*prompt, *turns], tools, head + text, name)
        return hidden

    def _plain(self, preference: Preference) -> Rendered:
        preference, escape = self._special.escaped(preference, self._special.tokens)
        parts = [self._ended([TextPart(str(c.completion), True)], set()) for c in preference.candidates]
        return Rendered(str(preference.prompt), parts, True, escape=escape)

    def _ended(self, parts: list[TextPart], notes: set[str]) -> list[TextPart]:
        """Let the last assistant turn end with exactly one end token: cut what follows it, or append one."""
        last = len(parts) - 1
        while last >= 0 and not parts[last].is_trained:
            last -= 1
        text = parts[last].text if last >= 0 else ""
        if not text or text.isspace():
            return parts
        closes = self.ends.closes(text)
        if self.append_eos and not closes:
            text += self.tokenizer.eos_token
        elif closes and not self.ends.length_of(text):
            notes.add(f"ends_with_{self.ends.closing(text)}_where_generation_does_not_stop")
        return [*parts[:last], TextPart(text, True)]

    def _text_of(self, turns: list[Message]) -> str:
        return self._apply(turns)[0]

    def _apply(
        self,
        turns: list[Message],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        turns = [without_weight(turn) if "weight" in turn else turn for turn in turns]
        return self.chat.render(
            turns, add_generation_prompt, tools, self.arguments if given is None else given
        )

    def _example(self) -> str:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self._apply(turns)[0]
        except BadRow:
            return ""


def _turns(value: Any) -> list[Message]:
    """Messages; a text as one assistant turn."""
    return as_messages(value, "assistant")


def _as_turns(preference: Preference) -> Preference:
    """A preference of plain texts as a conversation of two turns."""
    candidates = [replace(c, completion=_turns(c.completion)) for c in preference.candidates]
    prompt = [{"role": "user", "content": preference.prompt}]
    return replace(preference, prompt=prompt, candidates=candidates)


def _leading_bos(tokenizer: Any) -> str:
    """The beginning-of-sequence token where the tokenizer itself puts it before every text."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return (
        tokenizer.bos_token if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id] else ""
    )
