"""Where the assistant's turns of a completion stand in one rendering of the whole conversation.

A turn is what the template adds to the rendering of the conversation before it, where that is how the template works.
Elsewhere (reasoning left out of earlier turns, system text that moves) the whole is rendered once more with marks around
the texts on both sides of the turn's beginning, and the beginning is where the generation prompt ends behind the text
before it.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from stages.data.messages import Message
from stages.data.source_row import BadRow
from stages.tokenization.thinking import split_reasoning
from stages.tokenization.turn_ends import END, START, TurnEnds, common_start

# Marks around the text before a turn; START and END stand around the turn's own.
BEFORE, BEHIND = "\ufdee", "\ufdef"
MARKS = (START, END, BEFORE, BEHIND)
BEGUN_TAG = re.compile(r"[<\[][^<>\[\]\n]*$")
REWRITES = "the chat template rewrites earlier turns, so the prompt is not a prefix of the whole conversation"
REWRITES_BEGUN = "the chat template writes the assistant turn that the prompt begins otherwise once it is complete, so it cannot be continued"
OTHER_CONTEXT = "the chat template gives a turn behind the first another beginning than the conversation has; end the completion with its first assistant turn"
# (messages, add_generation_prompt) to a rendering.
Apply = Callable[[list[Message], bool], str]


class Place(NamedTuple):
    """An assistant's turn in a rendering: where it starts and ends, in characters.

    `opened`: the generation prompt before it, of which the rendering has all but `missing`, the end; `answer`: where the
    text behind the reasoning starts, 0 where that is not known. All three are empty where the rendering has the whole
    generation prompt.
    """

    start: int
    end: int
    opened: str = ""
    missing: str = ""
    answer: int = 0


class TurnPlaces:
    """Finds turns with one template."""

    def __init__(self, apply: Apply, ends: TurnEnds, continues: bool = False) -> None:
        """`apply` renders messages, `ends` finds the end of a turn; with `continues`, the head ends inside the first turn."""
        self._apply, self._ends, self._continues = apply, ends, continues

    def find(self, prompt: list[Message], head: str, turns: list[Message], whole: str) -> list[Place]:
        """The places of the assistant's turns in `whole`; `head` is the prompt with its generation prompt.

        Raises `BadRow` where a turn cannot be found for certain.
        """
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        places = self._by_prefix(prompt, head, turns, whole, numbers)
        places = places or self._by_marks(prompt, head, turns, whole, numbers)
        return [self._with_end(place, whole) for place in places]

    def _with_end(self, place: Place, whole: str) -> Place:
        """The place with the end token behind it, where the template writes that before the next turn."""
        if not self._ends.start_at(whole, place.end) or self._ends.end_at(whole, place.start, place.end):
            return place
        behind = whole[place.end :]
        found = max(len(token) for token in self._ends.tokens if behind.startswith(token))
        return place._replace(end=place.end + found)

    def _by_prefix(
        self, prompt: list[Message], head: str, turns: list[Message], whole: str, numbers: list[int]
    ) -> list[Place] | None:
        """The places where each rendering begins with that of the turns before it; None where one does not."""
        places = []
        for number in numbers:
            opened = self._apply(prompt + turns[:number], True) if number else head
            if not whole.startswith(opened):
                return None
            closed = whole
            if number + 1 < len(turns):
                closed = self._apply(prompt + turns[: number + 1], False)
                if not closed.startswith(opened) or not whole.startswith(closed):
                    return None
            added = closed[len(opened) :]
            said = max(added.rfind(_last_text(turns[number])), 0)
            places.append(Place(len(opened), len(opened) + self._ends.end_of(added, said)))
        return places

    def _by_marks(
        self, prompt: list[Message], head: str, turns: list[Message], whole: str, numbers: list[int]
    ) -> list[Place]:
        if self._continues and not whole.startswith(head):
            raise BadRow(REWRITES_BEGUN)
        places = [self._marked(prompt, turns, number, whole) for number in numbers]
        first = places[0]
        if self._continues:
            return [Place(len(head), first.end), *places[1:]]
        if len(numbers) > 1 and not _is_same(whole[: first.start] + first.missing, head):
            self._check_contexts(prompt, head, turns, whole, list(zip(numbers, places, strict=True)))
        return places

    def _check_contexts(
        self,
        prompt: list[Message],
        head: str,
        turns: list[Message],
        whole: str,
        places: list[tuple[int, Place]],
    ) -> None:
        """Raise `BadRow` where a turn behind the first would be trained in another context than it is written in.

        The prompt differs from the beginning of the rendering, such as by instructions that come with a generation prompt.
        """
        first = places[0][1]
        if not head.endswith(first.missing):
            raise BadRow(REWRITES)
        begin = head[: len(head) - len(first.missing)]
        for number, place in places[1:]:
            context = begin + whole[first.start : place.start] + place.missing
            if not _is_same(context, self._apply(prompt + turns[:number], True)):
                raise BadRow(OTHER_CONTEXT)

    def _marked(self, prompt: list[Message], turns: list[Message], number: int, whole: str) -> Place:
        everything, place = prompt + turns, len(prompt) + number
        marked = [dict(turn) for turn in everything]
        _mark_before(marked[place - 1])
        _mark_turn(marked[place])
        text = self._apply(marked, False)
        opened = self._apply(marked[:place], True).rpartition(BEHIND)[2]
        before, _, after = text.rpartition(BEHIND)
        # The name of a called function may stand in its result too.
        is_certain = START in after and text.count(BEHIND) == 1 and START not in before
        if _bare(text) != whole or not is_certain or (_has_text(turns[number]) and after.count(START) != 1):
            raise BadRow(REWRITES)
        begin = len(_bare(before))
        had, shared = _shared(opened, after)
        trailer = ""
        if had < len(opened) and (found := self._inserted(opened, _bare(after[: after.index(START)]))):
            had, (shared, trailer) = len(opened), found
        answer = begin + len(_bare(after[: after.index(START)]))
        inside, _, tail = after.partition(END)
        if place + 1 < len(everything):
            closed = self._apply(marked[: place + 1], False).rpartition(END)[2]
            tail = common_start(closed, tail)
        elif trailer:
            tail = tail.removesuffix(trailer)
        behind = begin + len(_bare(inside))
        if not _has_text(turns[number]):
            answer = 0  # the mark stands inside the call
        return Place(begin + shared, behind + self._ends.end_of(tail), opened, opened[had:], answer)

    def _inserted(self, opened: str, before: str) -> tuple[int, str] | None:
        """Where the turn starts in `before`, the text in front of its words, and what `opened` has more than that.

        Some generation prompts have instructions in front of the mark of the turn, which a finished conversation has at its
        end. None where the two differ otherwise.
        """
        header = opened[self._ends.last_end(opened) :].lstrip()
        place = before.rfind(header) if header else -1
        if place <= 0 or not opened.startswith(before[:place]):
            return None
        return place + len(header), opened[place : len(opened) - len(header)]


def _has_text(message: Message) -> bool:
    return bool(message["content"].strip())


def _last_text(message: Message) -> str:
    """The text of a turn that stands last in its rendering: of its last call, or else of its content."""
    calls = message.get("tool_calls")
    return calls[-1]["function"]["name"] if calls else message["content"].strip()


def _shared(opened: str, text: str) -> tuple[int, int]:
    """How many characters of a generation prompt and of a rendering are the same but for white space."""
    had = shared = 0
    while had < len(opened):
        if shared < len(text) and opened[had] == text[shared]:
            had, shared = had + 1, shared + 1
        elif opened[had].isspace():
            had += 1
        elif shared < len(text) and text[shared].isspace():
            shared += 1
        else:
            break
    begun = BEGUN_TAG.search(opened, 0, had) if had < len(opened) else None
    if begun is not None and text[:shared].endswith(begun.group()):
        return begun.start(), shared - len(begun.group())  # `<think>` and `</think>` share no tag
    return had, shared


def _is_same(first: str, second: str) -> bool:
    """Whether two texts are the same but for white space."""
    return "".join(first.split()) == "".join(second.split())


def _mark_before(message: Message) -> None:
    content = message["content"]
    if not content.strip():
        raise BadRow(REWRITES)
    message["content"] = _around(content, BEFORE, BEHIND)


def _mark_turn(message: Message) -> None:
    """Put marks around the answer of a turn, or, where it has none, around the first function that it calls."""
    content = message["content"]
    if content.strip():
        _, bare = split_reasoning(message)
        answer = bare["content"]
        message["content"] = content[: len(content) - len(answer)] + _around(answer, START, END)
        return
    if not message.get("tool_calls"):
        raise BadRow(REWRITES)
    first, *others = message["tool_calls"]
    function = {**first["function"], "name": START + first["function"]["name"] + END}
    message["tool_calls"] = [{**first, "function": function}, *others]


def _around(text: str, before: str, behind: str) -> str:
    """The text with marks inside the white space around it, which templates trim."""
    bare = text.strip()
    start = text.index(bare) if bare else 0
    return text[:start] + before + bare + behind + text[start + len(bare) :]


def _bare(text: str) -> str:
    for mark in MARKS:
        text = text.replace(mark, "")
    return text
