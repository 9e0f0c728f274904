"""The parts of a rendered completion: what the model writes is trained, what the template writes between turns is not.

In: a conversation, and the rendering of its prompt with the generation prompt, which is what the model will see. Out: the
text from there on in parts. Where the template has `{% generation %}` blocks, those say which text of a turn is trained;
elsewhere all of it is. A turn ends at the first token that generation stops at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stages.data.messages import Message
from stages.data.source_row import BadRow, Flagged
from stages.tokenization.thinking import (
    EMPTY_BLOCK,
    OWN_BLOCK,
    end_of_block,
    holds_block,
    open_block,
    split_reasoning,
)
from stages.tokenization.turn_ends import TurnEnds
from stages.tokenization.turn_places import REWRITES, Apply, Place, TurnPlaces

# Names under which `align prepare` counts rows: a turn before the last has no end token; a turn behind the first does not
# begin with all of the generation prompt, because the template leaves thinking blocks out of a finished conversation.
NO_END, NOT_OPENED = "turn_without_end_token", "later_turn_without_generation_prompt"
Spans = Sequence[tuple[int, int]]


class TextPart(NamedTuple):
    """A piece of a rendered completion, and whether its tokens are trained."""

    text: str
    is_trained: bool


@dataclass
class CompletionParts:
    """Makes the parts of the completions of one prompt.

    `head` is the prompt with its generation prompt, of which `opened` is the end that the template writes behind the text
    of a user. `notes` collects what is counted. With `continues`, the head ends inside the first turn of each completion,
    of which only the text behind the head is the completion.
    """

    apply: Apply
    ends: TurnEnds
    prompt: list[Message]
    head: str
    opened: str
    notes: set[str] = field(default_factory=set)
    continues: bool = False

    def __post_init__(self) -> None:
        self._places = TurnPlaces(self.apply, self.ends, self.continues)

    def of(
        self, turns: list[Message], whole: str, spans: Spans | None, needs_reasoning: bool
    ) -> list[TextPart]:
        """The parts of a completion; `whole` is the rendering of the conversation with it, `spans` its `{% generation %}` blocks.

        Raises `BadRow` where a turn cannot be found or is not marked; with `needs_reasoning` also where the first has none.
        """
        places = self._places.find(self.prompt, self.head, turns, whole)
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        added, start = self._added(places[0], answers[0], whole)
        if needs_reasoning and not split_reasoning(answers[0])[0].strip():
            raise Flagged("no_reasoning", "the turn has no reasoning, and prepare.thinking is on")
        parts, position = [TextPart(added, answers[0].get("weight") != 0)] if added else [], start
        for place, answer in zip(places, answers, strict=True):
            is_trained = answer.get("weight") != 0
            first = place.start + (self._header_length(whole, place) if place is not places[0] else 0)
            for begin, end in self._trained(max(position, first), place.end, whole, spans):
                parts += TextPart(whole[position:begin], False), TextPart(whole[begin:end], is_trained)
                position = end
            parts.append(TextPart(whole[position : place.end], False))
            position = place.end
            if is_trained and place is not places[0] and place.missing.strip():
                self.notes.add(NOT_OPENED)
            if is_trained and answer is not answers[-1] and not self.ends.length_of(whole[:position]):
                self.notes.add(NO_END)
        parts.append(TextPart(whole[position:], False))
        return [part for part in parts if part.text]

    def _added(self, place: Place, turn: Message, whole: str) -> tuple[str, int]:
        """What the model writes in a thinking block and the rendering lacks, and where the rendering goes on from there."""
        if self.continues:
            return "", place.start
        opened = place.opened or self.opened
        block, start = open_block(opened), place.start
        if block is None:
            if not place.missing.strip():
                return "", start
            # The generation prompt has closed the block; or the rendering has no mark in front of the answer.
            is_unmarked = place.answer and not whole[start : place.answer].strip()
            if not holds_block(opened) and not (is_unmarked and self.ends.are_marks(place.missing)):
                raise BadRow(REWRITES)
            return "", place.answer or start
        written = whole[start : place.answer or place.end]
        if block[1] in written or not self.head.endswith(opened):
            return "", start
        thought = split_reasoning(turn)[0].strip()
        thought = "" if thought in written else thought
        self.notes.add(OWN_BLOCK if thought else EMPTY_BLOCK)
        return thought + end_of_block(opened, block), place.answer or start

    def _header_length(self, whole: str, place: Place) -> int:
        """Characters of the generation prompt that a turn behind the first begins with.

        Some templates write it there and not behind the conversation before it, such as behind the result of a tool.
        """
        header = self.opened[
            self.ends.end_of(self.opened) if self.ends.has_end(self.opened) else 0 :
        ].lstrip()
        return len(header) if header and whole.startswith(header, place.start) else 0

    def _trained(self, start: int, end: int, whole: str, spans: Spans | None) -> Spans:
        """The trained stretches of a turn: all of it, or its `{% generation %}` blocks and its end token."""
        if spans is None:
            return ((start, end),)
        own = [(max(first, start), min(last, end)) for first, last in spans if first < end and last >= start]
        if not own:
            raise BadRow("the chat template has {% generation %} blocks and marks none of an assistant turn")
        token = end - self.ends.length_of(whole[start:end])
        return [*own, (token, end)] if token > own[-1][1] or token == own[-1][1] < end else own
