"""Thinking blocks: models that write their reasoning first, in a block that the generation prompt may open or close.

In: the end of a generation prompt, and what the template writes for the finished turn. Out: the text that the model has
to write from there: the reasoning of the row, or nothing, the end of the block, and the answer.
"""

from functools import lru_cache

from stages.data.messages import Message
from stages.tokenization.shown_text import REASONING_KEYS

# How blocks begin and end.
BLOCKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|think|>", "<|/think|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
# Names under which `align prepare` counts rows.
EMPTY_BLOCK, OWN_BLOCK, LEFT_OUT = (
    "thinking_block_closed_empty",
    "thinking_block_written_from_the_row",
    "reasoning_left_out",
)


@lru_cache(maxsize=64)
def open_block(text: str) -> tuple[str, str] | None:
    """Beginning and end of the block that is open at the end of a text; None where none is."""
    found = [(text.rfind(begin), begin, end) for begin, end in BLOCKS]
    place, begin, end = max(found)
    return (begin, end) if place >= 0 and end not in text[place + len(begin) :] else None


def holds_block(text: str) -> bool:
    """Whether the text holds the end of a block."""
    return any(end in text for _, end in BLOCKS)


def end_of_block(opened: str, block: tuple[str, str]) -> str:
    """What ends the block that `opened` ends with: line breaks where a line break follows its beginning."""
    begin, end = block
    if begin.startswith("Here"):
        return f"\n{end}\n"
    return f"\n{end}\n\n" if opened.rstrip(" ").endswith("\n") else end


def split_reasoning(message: Message) -> tuple[str, Message]:
    """The reasoning of a turn, "" where there is none, and the turn without it."""
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    found = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    for begin, end in BLOCKS:
        if end in rest["content"]:
            thought, _, answer = rest["content"].partition(end)
            # The text in front of a block is a part of the answer only where the block has a beginning.
            return found or thought.partition(begin)[2] or thought, {**rest, "content": answer.lstrip()}
    return found, rest


def without_reasoning(turns: list[Message]) -> tuple[list[Message], bool]:
    """The assistant's turns without their reasoning, and whether there was any."""
    found, had = [], False
    for turn in turns:
        thought, bare = split_reasoning(turn) if turn["role"] == "assistant" else ("", turn)
        had |= bool(thought.strip())
        found.append(bare)
    return found, had
